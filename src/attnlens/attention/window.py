"""Sliding-window attention: softmax over the keys nearer than `window` positions.

    out_i = sum_{j in P_i} exp(s <q_i, k_j>) v_j / sum_{j in P_i} exp(s <q_i, k_j>),   s = 1/sqrt(d),
    P_i = {j : 0 <= i - j < w} causal,   {j : |i - j| < w} bidirectional,

so w keys a row when causal and 2w - 1 else, the row's own key included. Time O(n w d), memory O(n (w + d)) with masks.
Equals softmax attention when w >= n, in both modes.

The sequence is cut into blocks of w rows. Causal, a row sees the triangle of its own block and the complementary one
of the block before: two kernels, merged by their log-sum-exp. Bidirectional, it sees a band across its own and the
neighboring blocks: one kernel. Queries and keys are the same tokens, since a distance |i - j| needs common positions.

Source: "Generating Long Sequences with Sparse Transformers" (Child, Gray, Radford, Sutskever, 2019),
https://arxiv.org/abs/1904.10509; "Longformer: The Long-Document Transformer" (Beltagy, Peters, Cohan, 2020),
https://arxiv.org/abs/2004.05150. Departure: Longformer's window counts w/2 on each side.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import fold, unfold
from attnlens.linalg.dense import softmax_round_off, softmax_weights
from attnlens.linalg.partial import merge, partial_attention


def window_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    window: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Attention over the window, in blocks of `window` rows."""
    h, n = q.shape[1:3]
    if window >= n:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
    padding = None
    if key_padding_mask is not None:
        hidden = F.pad(~key_padding_mask, (0, -n % window), value=True)[:, None].expand(-1, h, -1)
        padding = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -torch.inf)
        padding = padding.reshape(-1, hidden.shape[2] // window, 1, window)
    q, k, v = fold(q, window), fold(k, window), fold(v, window)
    out = _causal_blocks(q, k, v, padding) if causal else _band(q, k, v, padding, n)
    return unfold(out, h, n)


def _causal_blocks(
    q: Float[Tensor, "bh t w d"],
    k: Float[Tensor, "bh t w d"],
    v: Float[Tensor, "bh t w dv"],
    padding: Float[Tensor, "bh t 1 w"] | None,
) -> Float[Tensor, "bh t w dv"]:
    """The triangle of the own block and, from the second block on, the complement in the block before."""
    out, lse = partial_attention(q, k, v, causal=True, bias=padding)
    row = torch.arange(q.shape[2], device=q.device)
    before = torch.zeros(row.shape[0], row.shape[0], dtype=q.dtype, device=q.device)
    before = before.masked_fill(row[None, :] <= row[:, None], -torch.inf)
    before = before if padding is None else before + padding[:, :-1]
    previous = partial_attention(q[:, 1:], k[:, :-1], v[:, :-1], bias=before)
    return torch.cat([out[:, :1], merge((out[:, 1:], lse[:, 1:]), previous)[0]], 1)


def _band(
    q: Float[Tensor, "bh t w d"],
    k: Float[Tensor, "bh t w d"],
    v: Float[Tensor, "bh t w dv"],
    padding: Float[Tensor, "bh t 1 w"] | None,
    length: int,
) -> Float[Tensor, "bh t w dv"]:
    """The band |i - j| < w over three blocks; blocks beyond the ends, and what fills up the last, are hidden."""
    t, w = q.shape[1:3]
    row, offset = torch.arange(w, device=q.device), torch.arange(-w, 2 * w, device=q.device)
    near = (row[:, None] - offset).abs() < w
    position = torch.arange(t, device=q.device)[:, None, None] * w + offset
    visible = near & (position >= 0) & (position < length)
    bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible, -torch.inf)[None]
    if padding is not None:
        bias = bias + _neighbors(padding.mT).mT
    return partial_attention(q, _neighbors(k), _neighbors(v), bias=bias)[0]


def _neighbors(x: Float[Tensor, "bh t w d"]) -> Float[Tensor, "bh t 3*w d"]:
    """Each block between the one before and the one after, zeros beyond the ends."""
    x = F.pad(x, (0, 0, 0, 0, 1, 1))
    return torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], 2)


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
        weights = softmax_weights(q.double(), k.double(), causal=causal, key_padding_mask=key_padding_mask)
        real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        values = torch.where(real[:, None, :, None], v, 0).double()
        pairs = real[:, None, :, None] & real[:, None, None, :]
        diameter = torch.cdist(values, values).masked_fill(~pairs, 0).amax((-2, -1))[..., None]
        position = torch.arange(q.shape[2], device=q.device)
        near = (position[:, None] - position).abs() < self.window
        kept, dropped = weights.masked_fill(~near, 0).sum(-1), weights.masked_fill(near, 0).sum(-1)
        bound = torch.where(kept > 0, dropped * diameter, values.norm(dim=-1).amax(-1, keepdim=True))
        keys = torch.where(real[:, None, :, None], k, 0)
        return (bound + softmax_round_off(q, keys, values.to(q.dtype))).to(q.dtype)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return window_attention(q, k, v, self.window, causal=causal, key_padding_mask=key_padding_mask)
