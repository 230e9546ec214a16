"""The band of keys near a row, as `(out, lse)`, so that it can be merged with other keys of a sparse pattern.

The sequence is cut into t blocks of w rows, which go to the batch axis: (batch * t, heads, w, d). Masks then need no
axis of heads. Causal, a row sees the triangle of its own block and the complementary one of the block before;
bidirectional, a band across its own and the two neighboring blocks. Time O(n w d), memory O(n (d + w)).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.partial import merge, partial_attention


def to_blocks(x: Float[Tensor, "b h n d"], size: int) -> Float[Tensor, "b t h s d"]:
    """Blocks of `size` consecutive rows, the last filled up with zeros."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % size))
    return x.unflatten(2, (-1, size)).transpose(1, 2)


def from_blocks(x: Float[Tensor, "b t h s d"], length: int) -> Float[Tensor, "b h n d"]:
    """The inverse of `to_blocks`, cut to `length` rows."""
    return x.transpose(1, 2).flatten(2, 3)[:, :, :length]


def hidden_keys(
    key_padding_mask: Bool[Tensor, "b n"] | None, length: int, size: int, like: Float[Tensor, "..."]
) -> Float[Tensor, "#b t s"] | None:
    """-inf on padding and on what fills up the last block, else 0; None where there is neither."""
    if key_padding_mask is None and length % size == 0:
        return None
    if key_padding_mask is None:
        key_padding_mask = torch.ones(1, length, dtype=torch.bool, device=like.device)
    hidden = F.pad(~key_padding_mask, (0, -length % size), value=True)
    bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)
    return bias.unflatten(1, (-1, size))


def band(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    window: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
    skip: int | None = None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Attention over 0 <= i - j < window (causal) or |i - j| < window.

    `skip` (bidirectional only) leaves out the keys at a multiple of `skip` from the row, its own key included.
    """
    b, n = q.shape[0], q.shape[2]
    if window >= n and skip is None:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)
    # What fills up the last block comes after every row: only a row that looks ahead could see it.
    padded = key_padding_mask is not None or not causal
    padding = hidden_keys(key_padding_mask, n, window, q) if padded else None
    padding = None if padding is None else padding.expand(b, -1, -1)[:, :, None, None]
    q, k, v = to_blocks(q, window), to_blocks(k, window), to_blocks(v, window)
    out, lse = _triangles(q, k, v, padding) if causal else _three_blocks(q, k, v, padding, skip)
    return from_blocks(out, n), from_blocks(lse[..., None], n)[..., 0]


def leading_and_band(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    lead: int,
    window: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h r dv"]:
    """The rows from `lead` on, over the first `lead` keys and over the band among the keys that follow: disjoint."""
    mask = key_padding_mask
    first, rest = (None, None) if mask is None else (mask[:, :lead], mask[:, lead:])
    rows, keys, values = q[:, :, lead:], k[:, :, lead:], v[:, :, lead:]
    near = band(rows, keys, values, window, causal=causal, key_padding_mask=rest)
    if lead == 0:
        return near[0]
    return merge(near, partial_attention(rows, k[:, :, :lead], v[:, :, :lead], key_padding_mask=first))[0]


def _triangles(
    q: Float[Tensor, "b t h w d"],
    k: Float[Tensor, "b t h w d"],
    v: Float[Tensor, "b t h w dv"],
    padding: Float[Tensor, "b t 1 1 w"] | None,
) -> tuple[Float[Tensor, "b t h w dv"], Float[Tensor, "b t h w"]]:
    """The triangle of the own block and, from the second block on, the complement in the block before."""
    b, t, w = q.shape[0], q.shape[1], q.shape[3]
    bias = None if padding is None else padding.flatten(0, 1)
    own = partial_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), causal=True, bias=bias)
    row = torch.arange(w, device=q.device)
    before = torch.zeros(w, w, dtype=q.dtype, device=q.device).masked_fill(row <= row[:, None], -torch.inf)
    before = before if padding is None else before + padding[:, :-1].flatten(0, 1)
    q, k, v = q[:, 1:].flatten(0, 1), k[:, :-1].flatten(0, 1), v[:, :-1].flatten(0, 1)
    previous = partial_attention(q, k, v, bias=before)
    out, lse = (x.unflatten(0, (b, t)) for x in own)
    merged = merge((out[:, 1:].flatten(0, 1), lse[:, 1:].flatten(0, 1)), previous)
    rest_out, rest_lse = (x.unflatten(0, (b, t - 1)) for x in merged)
    return torch.cat([out[:, :1], rest_out], 1), torch.cat([lse[:, :1], rest_lse], 1)


def _three_blocks(
    q: Float[Tensor, "b t h w d"],
    k: Float[Tensor, "b t h w d"],
    v: Float[Tensor, "b t h w dv"],
    padding: Float[Tensor, "b t 1 1 w"] | None,
    skip: int | None,
) -> tuple[Float[Tensor, "b t h w dv"], Float[Tensor, "b t h w"]]:
    """The band |i - j| < w over the own block and its neighbors; blocks beyond the ends are hidden."""
    b, t, w = q.shape[0], q.shape[1], q.shape[3]
    gap = torch.arange(-w, 2 * w, device=q.device) - torch.arange(w, device=q.device)[:, None]
    near = gap.abs() < w
    near = near if skip is None else near & (gap % skip != 0)
    beyond = _neighbors(torch.zeros(1, t, 1, w, 1, device=q.device), fill=1.0)[:, :, :, None, :, 0] > 0
    bias = torch.zeros(1, t, 1, w, 3 * w, dtype=q.dtype, device=q.device).masked_fill(~near | beyond, -torch.inf)
    bias = bias if padding is None else bias + _neighbors(padding.mT).mT
    bias = bias.expand(b, -1, -1, -1, -1).flatten(0, 1)
    out, lse = partial_attention(q.flatten(0, 1), _neighbors(k).flatten(0, 1), _neighbors(v).flatten(0, 1), bias=bias)
    return out.unflatten(0, (b, t)), lse.unflatten(0, (b, t))


def _neighbors(x: Float[Tensor, "b t h w d"], fill: float = 0.0) -> Float[Tensor, "b t h 3*w d"]:
    """Each block between the one before and the one after, `fill` beyond the ends."""
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1), value=fill)
    return torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], 3)
