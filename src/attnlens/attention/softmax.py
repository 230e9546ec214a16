"""Exact softmax attention: what every approximation is measured against.

    out = P v,   P_ij = exp(s <q_i, k_j>) / sum_l exp(s <q_i, k_l>),   s = 1/sqrt(d),

with the sums over the visible keys. Time O(n m d); memory O(n d) in the fused kernel, O(n m) in the naive form.
Exact at every length.

Source: "Attention Is All You Need" (Vaswani et al., 2017), https://arxiv.org/abs/1706.03762; the fused kernel is
PyTorch's form of "FlashAttention" (Dao et al., 2022).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.partial import partial_attention


def softmax_weights(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n m"]:
    """The matrix P in q's dtype, materialized; a row that sees no key is zero."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if key_padding_mask is not None:
        hidden = hidden | ~key_padding_mask[:, None, None, :]
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return weights.masked_fill(hidden, 0)


def softmax_naive(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """P v by its definition: the reference, in float64 when given float64. Padded keys and values are not read."""
    if key_padding_mask is not None:
        real = key_padding_mask[:, None, :, None]
        k, v = torch.where(real, k, 0), torch.where(real, v, 0)
    return softmax_weights(q, k, causal=causal, key_padding_mask=key_padding_mask) @ v


class Softmax(AbstractAttention):
    """Exact attention by the fused kernel of the device."""

    family = "exact"
    row_stochastic = True
    native_half = True

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
        """Round-off: a perturbation ds of the scores moves a row by at most |ds|_inf times the diameter of v.

        Scores carry a relative error of about d eps in |q_i| |k_j|, the sums over j another sqrt(m) eps.
        """
        eps, d, m = torch.finfo(q.dtype).eps, q.shape[-1], k.shape[2]
        reach = q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True) * d**-0.5
        return eps * (d * reach + 8 * m**0.5) * v.norm(dim=-1).amax(-1, keepdim=True)

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
