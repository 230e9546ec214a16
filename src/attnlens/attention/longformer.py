"""Longformer's pattern: a sliding window, and a few global tokens that see every key and that every row sees.

    out_i = sum_{j in P_i} exp(s <q_i, k_j>) v_j / sum_{j in P_i} exp(s <q_i, k_j>),   s = 1/sqrt(d),
    P_i = {j : i < g or j < g or |i - j| < w},   causal its lower part {j in P_i : j <= i},

with g = `num_global` tokens at the start of the sequence. Time O(n (w + g) d), memory O(n (w + d)). Equals softmax
attention when w >= n or g >= n, in both modes, and when g + w >= n causal.

Three disjoint parts: the g rows over all keys, the other rows over the g keys, and the band among the tokens that
follow; the last two are merged by their log-sum-exp. Causal, a global row sees what precedes it, which is global too:
the pattern is then that of `streaming` with g sinks.

Source: "Longformer: The Long-Document Transformer" (Beltagy, Peters, Cohan, 2020), https://arxiv.org/abs/2004.05150.
Departures: the paper gives global tokens projections of their own, while this is an operator on given q, k and v,
which serve both roles; its window counts w/2 on each side; the task chooses its global tokens, here the first ones
(where a class token or a question stands, so padding belongs on the right); no dilation.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.band import leading_and_band
from attnlens.linalg.dropped_mass import dropped_mass_bound
from attnlens.linalg.partial import partial_attention


def longformer_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    num_global: int,
    window: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Global rows over every key they may see, the other rows over the global keys and the window."""
    n, g = q.shape[2], num_global
    if max(g, window) >= n or (causal and g + window >= n):
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
    rest = leading_and_band(q, k, v, g, window, causal=causal, key_padding_mask=key_padding_mask)
    if g == 0:
        return rest
    reach = g if causal else n
    mask = None if key_padding_mask is None else key_padding_mask[:, :reach]
    first, keys, values = q[:, :, :g], k[:, :, :reach], v[:, :, :reach]
    return torch.cat([partial_attention(first, keys, values, causal=causal, key_padding_mask=mask)[0], rest], 2)


class Longformer(AbstractAttention):
    """Sliding window and symmetric global tokens.

    Args:
        window: positions a row sees on each side, its own included, at least 1.
        num_global: tokens at the start that see all and are seen by all, at least 0.
    """

    family = "sparse"
    budget = "window"
    self_attention = True
    row_stochastic = True

    def __init__(self, window: int, num_global: int = 1) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"`window` must be at least 1 (the row's own key), got {window}")
        if num_global < 0:
            raise ValueError(f"`num_global` must be at least 0, got {num_global}")
        self.window, self.num_global = window, num_global

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
        return longformer_attention(
            q, k, v, self.num_global, self.window, causal=causal, key_padding_mask=key_padding_mask
        )
