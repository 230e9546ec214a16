"""Multi-head attention: one query, key and value per head, all of the same width.

y = concat_h(Attention(x Wq_h, x Wk_h, x Wv_h)) Wo

Cache: 2 H d floats a token for H heads of width d.

Reference: "Attention is all you need", Vaswani et al., 2017, https://arxiv.org/abs/1706.03762.
"""

from typing import final

from attnlens.attention.base import AbstractAttention
from attnlens.position.base import AbstractPosition
from attnlens.projection.multihead import AbstractMultiHead


@final
class Mha(AbstractMultiHead):
    """Multi-head attention around any operator; the arguments are those of `AbstractMultiHead`."""

    def __init__(
        self,
        attention: AbstractAttention,
        width: int,
        num_heads: int,
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
            num_heads,
            position=position,
            packed=packed,
            short_convolution=short_convolution,
            bias=bias,
        )
