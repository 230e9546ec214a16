"""The band of keys near a row, as `(out, lse)`, so that it can be merged with other keys of a sparse pattern.

Rows are cut into blocks of r, and all keys that a block's rows see lie in one window of r + w positions (bidirectional
r + 2 w). The windows of consecutive blocks overlap; they are views of K and V with a stride of r, so that one kernel
takes all blocks under one mask and nothing is copied. Rows too near an end for a whole window are one small kernel at
each end. Work (1 + r/w) of the band's: a quarter more at r = w/4, where blocks of w rows would be twice the band. With
gradients r = w/2, since the backward pass writes the gradient of every window. Time O(n w d), memory O(n d + r w)
forward, O(n d w / r) backward.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.windows import windows

LEAST_ROWS, MOST_ROWS = 16, 128


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
    n = q.shape[2]
    if window >= n and skip is None:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)
    ahead = 0 if causal else min(window, n)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    size = min(max(window // (2 if learns else 4), LEAST_ROWS), MOST_ROWS)
    blocks = max(0, (n - window - ahead) // size)
    lead = n - ahead - blocks * size

    def stretch(first: int, last: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows first..last - 1 over the keys start..stop - 1, which hold all that these rows see."""
        gap = _gaps(torch.arange(first, last, device=q.device), torch.arange(start, stop, device=q.device))
        bias = _bias(gap, window, causal, skip, q)
        mask = None if key_padding_mask is None else key_padding_mask[:, start:stop]
        keys, values = k[:, :, start:stop], v[:, :, start:stop]
        return partial_attention(q[:, :, first:last], keys, values, key_padding_mask=mask, bias=bias)

    if blocks < 2:
        return stretch(0, n, 0, n)
    parts = [stretch(0, lead, 0, min(n, lead + ahead))]
    inner = slice(lead - window, n)
    padding = None if key_padding_mask is None else key_padding_mask[:, inner]
    rows = q[:, :, lead : n - ahead]
    parts.append(_blocks(rows, k[:, :, inner], v[:, :, inner], size, window, ahead, causal, skip, padding))
    if ahead > 0:
        parts.append(stretch(n - ahead, n, max(0, n - ahead - window), n))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _blocks(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    size: int,
    window: int,
    ahead: int,
    causal: bool,
    skip: int | None,
    padding: Bool[Tensor, "b m"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Blocks of `size` rows whose windows are whole: row i stands at key i + window."""
    b, h, n = q.shape[:3]
    width = window + size + ahead
    position = torch.arange(width, device=q.device)
    bias = _bias(_gaps(position[window : window + size], position), window, causal, skip, q)
    if padding is not None:
        seen = padding.unfold(1, width, size)[:, None, :, None].expand(-1, h, -1, -1, -1).flatten(0, 1)
        bias = bias.masked_fill(~seen, -torch.inf)
    keys, values = (windows(x, width, size).flatten(0, 1) for x in (k, v))
    out, lse = partial_attention(q.unflatten(2, (-1, size)).flatten(0, 1), keys, values, bias=bias)
    return out.reshape(b, h, n, -1), lse.reshape(b, h, n)


def _gaps(row: Int[Tensor, "n"], key: Int[Tensor, "m"]) -> Int[Tensor, "n m"]:
    """How far each key lies before each row."""
    return row[:, None] - key


def _bias(
    gap: Int[Tensor, "n m"], window: int, causal: bool, skip: int | None, like: Float[Tensor, "..."]
) -> Float[Tensor, "n m"]:
    """0 on the band and -inf elsewhere."""
    near = (gap < window) & (gap > (-1 if causal else -window))
    near = near if skip is None else near & (gap % skip != 0)
    return torch.zeros(gap.shape, dtype=like.dtype, device=like.device).masked_fill(~near, -torch.inf)


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
