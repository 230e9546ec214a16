"""Grouped-query attention: the query heads of a group share one key and one value.

y = concat_h(Attention(x Wq_h, x Wk_g(h), x Wv_g(h))) Wo,   g(h) = h // (H/G)

Cache: 2 G d floats a token for G groups of width d. G = H is multi-head attention, G = 1 multi-query attention, which
equals multi-head attention with the same key and value matrix in every head.

References: "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", Ainslie et al.,
2023, https://arxiv.org/abs/2305.13245; "Fast Transformer Decoding: One Write-Head is All You Need", Shazeer, 2019,
https://arxiv.org/abs/1911.02150.
"""

from typing import final

from attnlens.attention.base import AbstractAttention
from attnlens.position.base import AbstractPosition
from attnlens.projection.multihead import AbstractMultiHead


@final
class Gqa(AbstractMultiHead):
    """Grouped-query attention around any operator; the arguments are those of `AbstractMultiHead`."""

    def __init__(
        self,
        attention: AbstractAttention,
        width: int,
        num_heads: int,
        num_groups: int,
        *,
        position: AbstractPosition | None = None,
        packed: bool = False,
        short_convolution: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(
            attention,
            width,
            num_heads,
            num_groups,
            position=position,
            packed=packed,
            short_convolution=short_convolution,
            bias=bias,
        )
