"""A learned vector for each row and each column of a grid, added to the embeddings; token t is cell (t // C, t % C).

    n / C + C vectors for n positions, so that what is learned of one row holds for all columns.

Reference: "Axial Attention in Multidimensional Transformers", Ho et al., 2019, https://arxiv.org/abs/1912.12180.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.position.base import AbstractPosition


@final
class Grid(AbstractPosition):
    """Adds the sum of two trained vectors, of the token's row and of its column.

    Args:
        width: of the embeddings.
        max_length: the longest sequence; the grid has as many rows as it needs.
        num_columns: C, the length of a row, at least 1.
        std: standard deviation of the sums at first.
    """

    def __init__(self, width: int, max_length: int, num_columns: int, *, std: float = 0.02) -> None:
        super().__init__(max_length)
        if num_columns < 1:
            raise ValueError(f"`num_columns` must be at least 1, got {num_columns}")
        self.rows = nn.Parameter(torch.empty(-(-max_length // num_columns), width).normal_(std=std * 0.5**0.5))
        self.columns = nn.Parameter(torch.empty(num_columns, width).normal_(std=std * 0.5**0.5))

    def embed(self, x: Float[Tensor, "b n w"], *, offset: int = 0) -> Float[Tensor, "b n w"]:
        self.check(offset + x.shape[1])
        table = (self.rows[:, None] + self.columns).flatten(0, 1)
        return x + table[offset : offset + x.shape[1]]
