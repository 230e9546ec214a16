"""A learned vector for each position, added to the embeddings.

Reference: "Convolutional sequence to sequence learning", Gehring et al., 2017.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.position.base import AbstractPosition


@final
class Learned(AbstractPosition):
    """Adds row t of a trained table to the embedding of token t.

    Args:
        width: of the embeddings.
        max_length: number of rows of the table.
        std: standard deviation of the rows at first.
    """

    def __init__(self, width: int, max_length: int, *, std: float = 0.02) -> None:
        super().__init__(max_length)
        table = torch.empty(max_length, width)
        self.table = nn.Parameter(table if table.is_meta else table.normal_(std=std))

    def embed(self, x: Float[Tensor, "b n w"], *, offset: int = 0) -> Float[Tensor, "b n w"]:
        self.check(offset + x.shape[1])
        return x + self.table[offset : offset + x.shape[1]]
