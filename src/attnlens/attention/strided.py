"""Sparse Transformer's two patterns: near keys, and a regular grid of far ones.

    out_i = sum_{j in P_i} exp(s <q_i, k_j>) v_j / sum_{j in P_i} exp(s <q_i, k_j>),   s = 1/sqrt(d),
    strided:  P_i = {j : |i - j| < w or (i - j) mod l = 0},
    fixed:    P_i = {j : floor(j / w) = floor(i / w) or j mod l >= l - c},      causal: those of P_i with j <= i,

with window w, stride l and, in the fixed pattern, c summary columns at the end of every run of l. Time
O(n (w + c n / l) d), with c = 1 if strided, so O(n^1.5 d) at w = l = sqrt(n). Memory O(n (w + d)) strided,
O(n (d + 1024 c / l)) fixed.
Equals softmax attention when w >= n, or l = 1 strided, or c = l fixed, in both modes.

Two disjoint parts, merged by their log-sum-exp. Strided: the band, and the sequence dealt into l phases (positions of
equal remainder), which become l short sequences of dense attention; causal, the phases leave out what the band has,
bidirectional the band leaves out what the phases have. Fixed: the own block, and the summary columns outside it.

Source: "Generating Long Sequences with Sparse Transformers" (Child, Gray, Radford, Sutskever, 2019),
https://arxiv.org/abs/1904.10509. Departures: one head attends to the union of the two parts (the paper's merged head);
w and l are two arguments (the paper has w = l, which with i - l on the grid is its {i - l, ..., i}), so that cost grows
with w; a bidirectional form beside the causal one, which is its lower part.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.band import band, from_blocks, hidden_keys, to_blocks
from attnlens.linalg.dropped_mass import dropped_mass_bound
from attnlens.linalg.partial import merge, partial_attention

ROWS = 1024


def strided_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    window: int,
    stride: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The band of `window` and every key at a multiple of `stride` from the row."""
    n, mask = q.shape[2], key_padding_mask
    if window >= n or stride == 1:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=mask)[0]
    near = band(q, k, v, window, causal=causal, key_padding_mask=mask, skip=None if causal else stride)
    # Keys of the phase fewer than `skipped` steps back lie in the causal band.
    skipped = min(-(-window // stride), -(-n // stride)) if causal else 0
    return merge(near, _phases(q, k, v, stride, skipped, causal=causal, key_padding_mask=mask))[0]


def _phases(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    stride: int,
    skipped: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Dense attention among the positions of equal remainder by `stride`; causal, at least `skipped` steps back."""
    b, n = q.shape[0], q.shape[2]
    hidden = hidden_keys(key_padding_mask, n, stride, q)
    bias = None if hidden is None else hidden.expand(b, -1, -1).mT.flatten(0, 1)[:, None, None]
    # (b, t, h, l, d): the place within a run of l becomes part of the batch, the run the position.
    q, k, v = (to_blocks(x, stride).movedim(3, 1).transpose(2, 3).flatten(0, 1) for x in (q, k, v))
    kept = q.shape[2] - skipped
    bias = None if bias is None else bias[..., :kept]
    out, lse = partial_attention(q[:, :, skipped:], k[:, :, :kept], v[:, :, :kept], causal=causal, bias=bias)
    out, lse = F.pad(out, (0, 0, skipped, 0)), F.pad(lse, (skipped, 0), value=-torch.inf)
    out, lse = (x.unflatten(0, (b, stride)).transpose(2, 3).movedim(1, 3) for x in (out, lse[..., None]))
    return from_blocks(out, n), from_blocks(lse, n)[..., 0]


def fixed_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    window: int,
    stride: int,
    num_summary: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The own block of `window` rows and the last `num_summary` columns of every run of `stride`."""
    b, n = q.shape[0], q.shape[2]
    if window >= n or num_summary == stride:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
    hidden = None if causal and key_padding_mask is None else hidden_keys(key_padding_mask, n, window, q)
    bias = None if hidden is None else hidden.expand(b, -1, -1).flatten(0, 1)[:, None, None]
    blocks = (to_blocks(x, window).flatten(0, 1) for x in (q, k, v))
    out, lse = (x.unflatten(0, (b, -1)) for x in partial_attention(*blocks, causal=causal, bias=bias))
    own = from_blocks(out, n), from_blocks(lse[..., None], n)[..., 0]
    return merge(own, _summaries(q, k, v, window, stride, num_summary, causal, key_padding_mask))[0]


def _summaries(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    window: int,
    stride: int,
    num_summary: int,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """The summary columns outside the row's own block, `ROWS` rows at a time so that the masks stay small."""
    n, offset = q.shape[2], stride - num_summary

    def below(stop: int) -> int:
        """Summary columns before position `stop`."""
        return stop // stride * num_summary + max(0, stop % stride - offset)

    runs = torch.arange(0, n, stride, device=q.device)[:, None]
    column = (runs + offset + torch.arange(num_summary, device=q.device)).flatten()[: below(n)]
    keys, values = k.index_select(2, column), v.index_select(2, column)
    mask = None if key_padding_mask is None else key_padding_mask.index_select(1, column)
    outs, lses = [], []
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        seen = below(stop) if causal else below(n)
        first = (torch.arange(start, stop, device=q.device) // window * window)[:, None]
        outside = column[:seen] < first
        outside = outside if causal else outside | (column[:seen] >= first + window)
        bias = torch.zeros(outside.shape, dtype=q.dtype, device=q.device).masked_fill(~outside, -torch.inf)
        padding = None if mask is None else mask[:, :seen]
        part = keys[:, :, :seen], values[:, :, :seen]
        out, lse = partial_attention(q[:, :, start:stop], *part, key_padding_mask=padding, bias=bias)
        outs, lses = [*outs, out], [*lses, lse]
    return torch.cat(outs, 2), torch.cat(lses, 2)


class Strided(AbstractAttention):
    """The strided pattern, or with `num_summary` the fixed one.

    Args:
        window: near keys: positions on each side, the own included (strided), or the block's size (fixed), at least 1.
        stride: distance of the far keys (strided) or of their runs (fixed), at least 1; near sqrt(length) in the paper.
        num_summary: far columns at the end of every run, 1..stride, for the fixed pattern; None for the strided one.
    """

    family = "sparse"
    budget = "window"
    self_attention = True
    row_stochastic = True

    def __init__(self, window: int, stride: int, num_summary: int | None = None) -> None:
        super().__init__()
        for name, value in (("window", window), ("stride", stride)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if num_summary is not None and not 1 <= num_summary <= stride:
            raise ValueError(f"`num_summary` must be in 1..`stride`={stride} or None, got {num_summary}")
        self.window, self.stride, self.num_summary = window, stride, num_summary

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
        w, stride, c = self.window, self.stride, self.num_summary
        if c is None:
            return strided_attention(q, k, v, w, stride, causal=causal, key_padding_mask=key_padding_mask)
        return fixed_attention(q, k, v, w, stride, c, causal=causal, key_padding_mask=key_padding_mask)
