"""Cutting a sequence into blocks, groups and tiles, so that one large kernel serves them all.

- `fold` cuts by position into blocks of one size.
- `balanced_groups` cuts by rank: the c real tokens of an example, sorted by a key, go to L = ceil(c / size) groups;
  group g takes the ranks floor(g c / L) .. floor((g + 1) c / L) - 1, so that sizes differ by one at most. Padding is
  sorted last and belongs to no group: the groups of an example do not depend on the length it is padded to.
- `tiles` cuts rows that were sent to blocks of their own choice, few to one and many to another, into tiles of one
  size, every tile of one block only; shapes depend on the number of rows alone.

Indices carry no gradient: cutting is constant where it does not jump.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F


def fold(x: Shaped[Tensor, "b h n d"], size: int) -> Shaped[Tensor, "b*h t s d"]:
    """Blocks of `size` consecutive rows, the last filled up with zeros; heads go to the batch axis."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % size))
    return x.reshape(-1, x.shape[2] // size, size, x.shape[3])


def unfold(x: Shaped[Tensor, "bh t s d"], heads: int, length: int) -> Shaped[Tensor, "b h n d"]:
    """The inverse of `fold`, cut to `length` rows."""
    return x.reshape(x.shape[0] // heads, heads, -1, x.shape[3])[:, :, :length]


def host_reads_are_free(x: Tensor) -> bool:
    """Whether shapes may follow values: elsewhere reading them waits for the device or breaks the compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def scores_at_once(x: Tensor) -> int:
    """How many scores to hold together: on a CPU their masks should stay in the cache, else memory is the limit."""
    return 2**20 if x.device.type == "cpu" else 2**26


def in_pieces(function: Callable[[Tensor], Tensor], x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n m"]:
    """`function`, which acts on every token alone, on pieces of the sequence whose intermediate results stay in cache.

    On a CPU a pass over fresh memory costs four times one over memory in use.
    """
    rows = max(1, scores_at_once(x) // 16 // (x.shape[0] * x.shape[1] * x.shape[3]))
    return function(x) if rows >= x.shape[2] else torch.cat([function(piece) for piece in x.split(rows, 2)], 2)


def take_rows(x: Float[Tensor, "b h n d"], index: Int[Tensor, "b h *k"]) -> Float[Tensor, "b h *k d"]:
    """Rows of `x` by index; a flat index_select, ten times as fast as a gather of an expanded index."""
    b, h, n, d = x.shape
    start = (torch.arange(b * h, device=x.device) * n).view(b, h, *(1,) * (index.ndim - 2))
    return x.reshape(-1, d).index_select(0, (index + start).flatten()).view(*index.shape, d)


def inverse(order: Int[Tensor, "*k n"]) -> Int[Tensor, "*k n"]:
    """The inverse of permutations of the last axis: rank of a token from the tokens in order."""
    position = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, position)


def real_first(key: Shaped[Tensor, "b *k n"], mask: Bool[Tensor, "b n"] | None) -> Int[Tensor, "b *k n"]:
    """Tokens by growing key, ties by position, padding after all real tokens."""
    order = key.detach().argsort(dim=-1, stable=True)
    if mask is None:
        return order
    # A second stable sort rather than an infinite key: a NaN key would come after the padding.
    padded = ~mask.view(mask.shape[0], *(1,) * (key.ndim - 2), -1).expand(key.shape)
    return order.gather(-1, padded.gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))


class Groups(NamedTuple):
    """Groups of nearly equal size.

    members: the token in each slot; a slot that is not filled names some token of the sequence.
    filled: which slots hold a real token, None if all do.
    place: the slot of each token, counted over all groups; that of padding means nothing.
    """

    members: Int[Tensor, "b *k groups slots"]
    filled: Bool[Tensor, "b *k groups slots"] | None
    place: Int[Tensor, "b *k n"]


def balanced_groups(key: Shaped[Tensor, "b *k n"], size: int, mask: Bool[Tensor, "b n"] | None) -> Groups:
    """Groups of at most `size` real tokens of similar key, as many as that takes and no more."""
    n, device = key.shape[-1], key.device
    order = real_first(key, mask)
    num_groups = -(-n // size)
    if mask is None:
        slots = -(-n // num_groups)
        count = torch.full((1,) * key.ndim, n, device=device)
    else:
        slots = min(size, n)
        count = mask.sum(-1).view(-1, *(1,) * (key.ndim - 1)).clamp_min(1)
    used = (count + size - 1) // size
    bounds = (torch.arange(num_groups + 1, device=device) * count // used).minimum(count)
    ranks = bounds[..., :-1, None] + torch.arange(slots, device=device)
    filled = None if n == num_groups * slots and mask is None else ranks < bounds[..., 1:, None]
    members = order.gather(-1, ranks.clamp(max=n - 1).flatten(-2).expand(*key.shape[:-1], -1))
    rank = inverse(order)
    group = (((rank + 1) * used - 1) // count).clamp(max=num_groups - 1)
    place = group * slots + rank - (group * count // used)
    place = place.clamp(max=num_groups * slots - 1)
    filled = None if filled is None else filled.expand(*key.shape[:-1], num_groups, slots)
    return Groups(members.unflatten(-1, (num_groups, slots)), filled, place)


class Tiles(NamedTuple):
    """Tiles of rows that go to the same block.

    block: the block of each tile.
    members: the row in each slot; slots left over name some row, and `place` leads to none of them.
    place: the slot of each row, counted over all tiles.
    """

    block: Int[Tensor, "*k tiles"]
    members: Int[Tensor, "*k tiles size"]
    place: Int[Tensor, "*k n"]


def tiles(block: Int[Tensor, "*k n"], num_blocks: int, size: int) -> Tiles:
    """Rows by the block that each chose, in tiles of `size`; floor((n + num_blocks (size - 1)) / size) always do."""
    n, device = block.shape[-1], block.device
    num_tiles = min(n, (n + num_blocks * (size - 1)) // size)
    order = block.argsort(dim=-1, stable=True)
    zeros = torch.zeros(*block.shape[:-1], num_blocks, dtype=torch.long, device=device)
    count = zeros.scatter_add(-1, block, torch.ones_like(block))
    start = count.cumsum(-1) - count
    used = (count + size - 1) // size
    end = used.cumsum(-1)
    within = inverse(order) - start.gather(-1, block)
    place = ((end - used).gather(-1, block) + within // size) * size + within % size
    tile = torch.arange(num_tiles, device=device).expand(*block.shape[:-1], num_tiles).contiguous()
    owner = torch.searchsorted(end, tile, right=True).clamp(max=num_blocks - 1)
    first = start.gather(-1, owner) + (tile - (end - used).gather(-1, owner)) * size
    slots = (first[..., None] + torch.arange(size, device=device)).clamp(max=n - 1)
    return Tiles(owner, order.gather(-1, slots.flatten(-2)).unflatten(-1, (num_tiles, size)), place)
