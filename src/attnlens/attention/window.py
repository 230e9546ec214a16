"""Sliding-window attention: softmax over the keys nearer than `window` positions.

    out_i = sum_{j in P_i} exp(s <q_i, k_j>) v_j / sum_{j in P_i} exp(s <q_i, k_j>),   s = 1/sqrt(d),
    P_i = {j : 0 <= i - j < w} causal,   {j : |i - j| < w} bidirectional,

so w keys a row when causal and 2w - 1 else, the row's own key included. Time O(n w d), memory O(n d). Equals softmax
attention when w >= n, in both modes.

One kernel over overlapping views of the keys (`linalg.band`). Queries and keys are the same tokens, since a distance
|i - j| needs common positions.

Source: "Generating Long Sequences with Sparse Transformers" (Child, Gray, Radford, Sutskever, 2019),
https://arxiv.org/abs/1904.10509; "Longformer: The Long-Document Transformer" (Beltagy, Peters, Cohan, 2020),
https://arxiv.org/abs/2004.05150. Departure: Longformer's window counts w/2 on each side.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.band import band
from attnlens.linalg.dropped_mass import dropped_mass_bound


class Window(AbstractAttention):
    """Sliding-window attention.

    Args:
        window: positions a row sees on each side, its own included, at least 1.
    """

    family = "sparse"
    budget = "window"
    self_attention = True
    row_stochastic = True

    def __init__(self, window: int) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"`window` must be at least 1 (the row's own key), got {window}")
        self.window = window

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With a window as long as the sequence."""
        return {"window": length}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """Dropped mass times the diameter of the values, from the dense matrix: analysis, not the fast path.

        With delta_i the softmax mass outside the window, out_i = (1 - delta_i) a + delta_i c for two means of values, a
        over the window, which the operator returns, and c over the rest: the error is delta_i |c - a|. A row
        whose window holds no real key returns zero and is off by max |v| at most. Round-off is added.
        """
        position = torch.arange(q.shape[2], device=q.device)
        near = (position[:, None] - position).abs() < self.window
        near = near.expand(*q.shape[:2], -1, -1)
        return dropped_mass_bound(near, q, k, v, causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return band(q, k, v, self.window, causal=causal, key_padding_mask=key_padding_mask)[0]
