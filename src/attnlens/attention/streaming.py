"""Attention sinks with a sliding window: softmax over the first `num_sinks` keys and the keys nearer than `window`.

    out_i = sum_{j in P_i} exp(s <q_i, k_j>) v_j / sum_{j in P_i} exp(s <q_i, k_j>),   s = 1/sqrt(d),
    P_i = {j <= i : j < num_sinks or i - j < w} causal,   {j : j < num_sinks or |i - j| < w} bidirectional,

so at most num_sinks + w keys a row when causal and num_sinks + 2w - 1 else. Time O(n (num_sinks + w) d), memory
O(n (w + d)). Equals softmax attention when w >= n, in both modes, and when num_sinks + w >= n causal.

The rows after the sinks merge two disjoint sets by their log-sum-exp: the sinks, and the band among the keys that
follow them. Sinks are the first positions of the sequence, so padding belongs on the right.

Source: "Efficient Streaming Language Models with Attention Sinks" (Xiao, Tian, Chen, Han, Lewis, 2023),
https://arxiv.org/abs/2309.17453. Departures: the paper renumbers positions inside its cache, which is a matter of the
rotation that is applied to q and k before they come here; it is causal only, and the bidirectional form is the same
two sets with the window open on both sides.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.band import leading_and_band
from attnlens.linalg.dropped_mass import dropped_mass_bound
from attnlens.linalg.partial import partial_attention


def streaming_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    num_sinks: int,
    window: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Attention over the sinks and the window; the rows of the sinks themselves are one small kernel."""
    n, s = q.shape[2], num_sinks
    if max(s, window) >= n or (causal and s + window >= n):
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
    rest = leading_and_band(q, k, v, s, window, causal=causal, key_padding_mask=key_padding_mask)
    if s == 0:
        return rest
    reach = s if causal else min(n, s + window - 1)
    mask = None if key_padding_mask is None else key_padding_mask[:, :reach]
    bias = None
    if not causal:
        key = torch.arange(reach, device=q.device)
        far = (key >= s) & (key - key[:s, None] >= window)
        bias = torch.zeros(s, reach, dtype=q.dtype, device=q.device).masked_fill(far, -torch.inf)
    first, keys, values = q[:, :, :s], k[:, :, :reach], v[:, :, :reach]
    first = partial_attention(first, keys, values, causal=causal, key_padding_mask=mask, bias=bias)[0]
    return torch.cat([first, rest], 2)


class Streaming(AbstractAttention):
    """Sliding-window attention that keeps the first tokens in sight.

    Args:
        window: positions a row sees on each side, its own included, at least 1.
        num_sinks: first positions that every row sees, at least 0.
    """

    family = "sparse"
    budget = "window"
    self_attention = True
    row_stochastic = True

    def __init__(self, window: int, num_sinks: int = 4) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"`window` must be at least 1 (the row's own key), got {window}")
        if num_sinks < 0:
            raise ValueError(f"`num_sinks` must be at least 0, got {num_sinks}")
        self.window, self.num_sinks = window, num_sinks

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
        """Dropped mass times the diameter of the values; at q = 0 the matrix is positive on what a row visits."""
        visited = self.matrix(torch.zeros_like(q), k, causal=causal, key_padding_mask=key_padding_mask) > 0
        return dropped_mass_bound(visited, q, k, v, causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return streaming_attention(
            q, k, v, self.num_sinks, self.window, causal=causal, key_padding_mask=key_padding_mask
        )
