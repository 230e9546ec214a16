"""Exact softmax attention: what every approximation is measured against.

    out = P v,   P_ij = exp(s <q_i, k_j>) / sum_l exp(s <q_i, k_l>),   s = 1/sqrt(d),

with the sums over the visible keys. Time O(n m d); memory O(n d) in the fused kernel, O(n m) in the naive form.
Exact at every length.

Source: "Attention Is All You Need" (Vaswani et al., 2017), https://arxiv.org/abs/1706.03762; the fused kernel is
PyTorch's form of "FlashAttention" (Dao et al., 2022). The naive form is `linalg.dense.softmax_naive`.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.dense import softmax_naive, softmax_round_off, softmax_weights
from attnlens.linalg.partial import partial_attention

__all__ = ["Softmax", "softmax_naive", "softmax_weights"]


class Softmax(AbstractAttention):
    """Exact attention by the fused kernel of the device."""

    family = "exact"
    row_stochastic = True
    native_half = True
    caches = True
    one_query = True

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """At every length."""
        return {}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """Round-off, as `softmax_round_off` has it."""
        return softmax_round_off(q, k, v)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
