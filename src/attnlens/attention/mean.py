"""Uniform attention: the mean of the visible values, whatever the queries and keys say.

    out_i = (1/|P_i|) sum_{j in P_i} v_j,   P_i = the visible keys of row i.

The null row of every table: an approximation whose error is not below that of mean(V) carries no information about
the attention matrix. It equals softmax attention in the limit of infinite temperature. Time and memory O(n d).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.dense import mean_values

__all__ = ["Mean", "mean_values"]


class Mean(AbstractAttention):
    """The null operator mean(V)."""

    family = "null"
    target = "itself"
    row_stochastic = True
    one_query = True

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """It is its own definition."""
        return {}

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """Softmax attention of zero queries, in float64: uniform weights from another formula."""
        return super().reference(torch.zeros_like(q), k, v, causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        mean = mean_values(v, causal=causal, key_padding_mask=key_padding_mask)
        # A query that holds NaN must not look healthy, although its value plays no role.
        return mean + q.sum(-1, keepdim=True) * 0
