"""Exact attention to one block of hashed keys, and an estimate of the rest: the skeleton of several samplers.

Keys sorted by their hyperplane code are cut into blocks of b. What a query does with the keys outside its block B_i is
up to an `Estimator`: a sample of keys, or random features.

- `equal_blocks`: queries are sorted by code too, and query block g gets key block g.
- `own_blocks`: a query goes to the block in whose interval of codes its own code falls. Rows depend on no other query,
  and there may be more or fewer queries than keys.
- `dyadic_cells`, causal: positions are cut into leaves of 4 b, leaves are paired into cells of 8 b, and so on. A row
  attends exactly to the past of its leaf and, for every cell in whose right half it lies, to the left half by
  `own_blocks`. A left half is wholly past, and cells, codes and draws belong to absolute positions, so that no output
  depends on later tokens or on their number.

Codes, blocks and draws are constants for the gradient.

Source: "HyperAttention: Long-context Attention in Near-Linear Time" (Han, Jayaram, Karbasi, Mirrokni, Woodruff,
Zandieh, 2023), https://arxiv.org/abs/2310.05869. Its causal recursion halves the sequence and sorts queries, and both
let the future in: blocks depend on later queries, halves on the length.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.blocks import balanced_groups, fold, inverse, take_rows, tiles, unfold
from attnlens.linalg.hashing import hyperplane_code
from attnlens.linalg.partial import merge, partial_attention

LEAF_BLOCKS = 4  # block and sample would fill a half of 2 b keys: the smallest worth sampling has 4 b


class Blocks(NamedTuple):
    """Tiles of rows with the block of keys that each attends to.

    rows: tiles of queries.
    k, v: the keys and values that the blocks were cut from; `mask` tells the real ones (None: all).
    members: the keys of every block; `present` tells which slots hold one (None: all).
    keys: for every tile the keys of its block; `filled` tells which slots hold one (None: all).
    owner: the number of that block.
    block_of_key: the block of every key.
    """

    rows: Float[Tensor, "b h t r d"]
    k: Float[Tensor, "b h c d"]
    v: Float[Tensor, "b h c dv"]
    mask: Bool[Tensor, "b #h c"] | None
    members: Int[Tensor, "b h g s"]
    present: Bool[Tensor, "b h g s"] | None
    keys: Int[Tensor, "b h t s"]
    filled: Bool[Tensor, "b h t s"] | None
    owner: Int[Tensor, "b h t"]
    block_of_key: Int[Tensor, "b h c"]


def tile_rows(blocks: Blocks, x: Float[Tensor, "b h c d"]) -> Float[Tensor, "b h t s d"]:
    """What `x` (the keys, the values, or what was made of them) has for the block of every tile.

    Rows are gathered once for every block; tiles then copy whole blocks, many times as fast as row by row.
    """
    of_blocks = take_rows(x, blocks.members)
    if blocks.keys is blocks.members:
        return of_blocks
    return take_rows(of_blocks.flatten(3), blocks.owner).unflatten(-1, of_blocks.shape[3:])


Partial = tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]
# `(out, lse)` of all rows, tile after tile, from the blocks and the draws that belong to the keys.
Estimator = Callable[..., Partial]


def estimated_matrix(estimate: Callable[..., Partial], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
    """The matrix A~ before it is normalized: what `estimate(k, values)` makes of the identity. For analysis."""
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
    out, lse = estimate(k, eye)
    return out * lse.exp()[..., None]


def equal_blocks(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    planes: Float[Tensor, "h d p"],
    draws: tuple[Shaped[Tensor, "h n"], ...],
    block_size: int,
    estimator: Estimator,
    *,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Partial:
    """The bidirectional form of equal groups; padded queries are empty rows."""
    b, h, n = q.shape[:3]
    if block_size >= n:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)
    of_queries = balanced_groups(hyperplane_code(q, planes), block_size, key_padding_mask)
    of_keys = balanced_groups(hyperplane_code(k, planes), block_size, key_padding_mask)
    groups, slots = of_keys.members.shape[-2:]
    mask = None if key_padding_mask is None else key_padding_mask[:, None]
    blocks = Blocks(
        take_rows(q, of_queries.members),
        k,
        v,
        mask,
        of_keys.members,
        of_keys.filled,
        of_keys.members,
        of_keys.filled,
        torch.arange(groups, device=q.device).expand(b, h, groups),
        of_keys.place // slots,
    )
    out, lse = estimator(blocks, *(x[None] for x in draws))
    out, lse = take_rows(out, of_queries.place), lse.gather(-1, of_queries.place)
    if mask is None:
        return out, lse
    return torch.where(mask[..., None], out, 0), torch.where(mask, lse, -torch.inf)


def own_blocks(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    planes: Float[Tensor, "h d p"],
    draws: tuple[Shaped[Tensor, "h m"], ...],
    block_size: int,
    estimator: Estimator,
    *,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Partial:
    """The bidirectional form in which a query is placed by its own code."""
    if block_size >= k.shape[2]:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)
    codes = hyperplane_code(q, planes), hyperplane_code(k, planes)
    mask = None if key_padding_mask is None else key_padding_mask[:, None].expand(-1, q.shape[1], -1)
    out, lse = _cell(q, codes[0], k, v, codes[1], tuple(x[None] for x in draws), block_size, mask, estimator)
    if mask is None:
        return out, lse
    some = mask.any(-1, keepdim=True)
    return torch.where(some[..., None], out, 0), torch.where(some, lse, -torch.inf)


def dyadic_cells(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    planes: Float[Tensor, "h d p"],
    draws: tuple[Shaped[Tensor, "h n"], ...],
    block_size: int,
    estimator: Estimator,
    *,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Partial:
    """The causal form."""
    n, size = q.shape[2], LEAF_BLOCKS * block_size
    if size >= n:
        return partial_attention(q, k, v, causal=True, key_padding_mask=key_padding_mask)
    mask = None if key_padding_mask is None else key_padding_mask[:, None]
    parts = [_leaves(q, k, v, size, mask)]
    codes = hyperplane_code(q, planes), hyperplane_code(k, planes)
    of_keys = tuple(x[None] for x in draws)
    while size < n:
        parts.append(_siblings(q, k, v, codes, of_keys, size, block_size, mask, estimator))
        size *= 2
    return merge(*parts)


def _leaves(q: Tensor, k: Tensor, v: Tensor, size: int, mask: Bool[Tensor, "b 1 n"] | None) -> Partial:
    """Exact causal attention inside blocks of `size` positions."""
    h, n = q.shape[1:3]
    bias = None
    if mask is not None:
        hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        bias = fold(hidden.expand(-1, h, -1)[..., None], size).mT
    out, lse = partial_attention(fold(q, size), fold(k, size), fold(v, size), causal=True, bias=bias)
    return unfold(out, h, n), unfold(lse[..., None], h, n)[..., 0]


def _siblings(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    codes: tuple[Int[Tensor, "b h n"], Int[Tensor, "b h n"]],
    draws: tuple[Shaped[Tensor, "1 h n"], ...],
    size: int,
    block_size: int,
    mask: Bool[Tensor, "b 1 n"] | None,
    estimator: Estimator,
) -> Partial:
    """Rows of every right cell of `size` positions over the cell left of it; other rows are empty."""
    h, n = q.shape[1:3]
    pairs = -(-(n - size) // (2 * size))
    rows = size if pairs > 1 else min(size, n - size)
    width = size + rows

    def cells(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        short = pairs * width - n
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, short)) if short > 0 else x  # padding by nothing would copy
        return x[:, :, : pairs * width].unflatten(2, (pairs, width))

    def past(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return cells(x)[:, :, :, :size].flatten(1, 2)

    def now(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return cells(x)[:, :, :, size:].flatten(1, 2)

    real = None if mask is None else past(mask.expand(-1, h, -1))
    of_keys = tuple(past(x) for x in draws)
    out, lse = _cell(now(q), now(codes[0]), past(k), past(v), past(codes[1]), of_keys, block_size, real, estimator)
    out = F.pad(out.unflatten(1, (h, pairs)), (0, 0, size, 0)).flatten(2, 3)
    lse = F.pad(lse.unflatten(1, (h, pairs)), (size, 0), value=-torch.inf).flatten(2, 3)
    missing = n - pairs * width
    if missing > 0:
        return F.pad(out, (0, 0, 0, missing)), F.pad(lse, (0, missing), value=-torch.inf)
    return out[:, :, :n], lse[:, :, :n]


def _cell(
    q: Float[Tensor, "b h n d"],
    q_code: Int[Tensor, "b h n"],
    k: Float[Tensor, "b h c d"],
    v: Float[Tensor, "b h c dv"],
    k_code: Int[Tensor, "b h c"],
    draws: tuple[Shaped[Tensor, "1 h c"], ...],
    block_size: int,
    mask: Bool[Tensor, "b h c"] | None,
    estimator: Estimator,
) -> Partial:
    """Each query over the block of sorted keys where its own code falls, the estimator over the other blocks."""
    c = k_code.shape[-1]
    count = torch.full_like(k_code[..., :1], c) if mask is None else mask.sum(-1, keepdim=True)
    if mask is not None:
        k_code = k_code.masked_fill(~mask, torch.iinfo(k_code.dtype).max)
    k_code, order = k_code.sort(dim=-1, stable=True)
    # Among keys of its own code the query takes the middle one, so that a crowded code does not crowd one block.
    below, above = (torch.searchsorted(k_code, q_code.contiguous(), right=side) for side in (False, True))
    rank = ((below + above) // 2).minimum(count - 1).clamp_min(0)
    num_blocks, place = -(-c // block_size), torch.arange(block_size, device=q.device)
    cut = tiles(rank // block_size, num_blocks, max(1, block_size // 2))
    slot = cut.block[..., None] * block_size + place
    whole = mask is None and c % block_size == 0
    every = torch.arange(num_blocks * block_size, device=q.device).view(num_blocks, block_size)
    blocks = Blocks(
        take_rows(q, cut.members),
        k,
        v,
        mask,
        F.pad(order, (0, -c % block_size)).unflatten(-1, (num_blocks, block_size)),
        None if whole else every < count[..., None],
        order.gather(-1, (slot if c % block_size == 0 else slot.clamp(max=c - 1)).flatten(2)).view(slot.shape),
        None if whole else slot < count[..., None],
        cut.block,
        inverse(order) // block_size,
    )
    out, lse = estimator(blocks, *draws)
    return take_rows(out, cut.place), lse.gather(-1, cut.place)
