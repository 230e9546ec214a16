"""Inputs on a grid for the tests of operators that fold a sequence."""

import torch
from torch import Tensor


def additive(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (a_r, b_c) whose logits are f(r, r') + g(c, c'), over all of a grid."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        part = torch.randn(2, 2, *shape, 4, generator=generator, dtype=torch.float64)
        return part.expand(2, 2, rows, columns, 4)

    q, k = (torch.cat([draw(rows, 1), draw(1, columns)], -1).flatten(2, 3) * 1.5 for _ in range(2))
    return q, k
