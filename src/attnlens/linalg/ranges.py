"""Attention of queries that each see one range of places in an order of the keys.

Queries with ranges of one start are cut into tiles. Tiles come by the width of their ranges, and runs of them share one
kernel call that is as wide as the widest of the run: no wider than the ranges are where the host may read their widths,
as wide as a range can be where it may not.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.linalg.blocks import host_reads_are_free, inverse, scores_at_once
from attnlens.linalg.partial import partial_attention


class Ranges(NamedTuple):
    """Tiles of queries and the places that they see.

    members: the query in each row; rows left over name some query, and `place` leads to none of them.
    place: the row of each query, counted over all tiles.
    low: the first place of each tile.
    width: the number of its places from there on, -1 for a tile that holds no query.
    room: how many of them each row sees, one number for all rows of a tile or one for each.
    """

    members: Int[Tensor, "*k t s"]
    place: Int[Tensor, "*k n"]
    low: Int[Tensor, "*k t"]
    width: Int[Tensor, "*k t"]
    room: Int[Tensor, "*k t #s"]


def room_bias(room: Int[Tensor, "t #s"], width: int, dtype: torch.dtype) -> Float[Tensor, "t 1 #s w"]:
    """0 for the first `room` of the keys, else -inf. Arithmetic on short integers: comparisons and fills of masks take
    a CPU ten times as long."""
    short = torch.int16 if 2 * width < 2**15 else torch.int32
    taken = 2 * room.clamp(0, width).to(short)[:, None, :, None]
    place = torch.arange(2, 2 * width + 2, 2, dtype=short, device=room.device)
    # Twice the largest number or more, which is -inf, for all keys after the room.
    return (place - taken).clamp_min_(0).to(dtype).mul_(-torch.finfo(dtype).max)


def runs_by_width(width: Int[Tensor, " t"], widest: int, at_once: int) -> tuple[Int[Tensor, " t"], list[int]]:
    """Tiles in an order in which runs of `at_once` have like widths, and the width of every run that holds queries."""
    if not host_reads_are_free(width):
        return torch.arange(len(width), device=width.device), [widest] * -(-len(width) // at_once)
    ordered, order = width.sort(descending=True)
    # The kernels like widths that are multiples of 16, and want one key at least.
    return order, [max(16, x + -x % 16) for x in ordered[::at_once].tolist() if x >= 0]


def range_attention(
    q: Float[Tensor, "g n d"],
    k: Float[Tensor, "g n d"],
    v: Float[Tensor, "g n dv"],
    order: Int[Tensor, "g n"],
    ranges: Ranges,
    widest: int,
) -> tuple[Float[Tensor, "g n dv"], Float[Tensor, "g n"]]:
    """`(out, lse)` of every query over the keys at its places in `order`; no range is wider than `widest`."""
    (g, n, d), (t, rows) = q.shape, ranges.members.shape[1:]
    heads = torch.arange(g, device=q.device)[:, None]
    token, members = (order + n * heads).flatten(), (ranges.members + n * heads[..., None]).flatten(0, 1)
    low, room = (ranges.low + n * heads).flatten(), ranges.room.flatten(0, 1)
    at_once = max(1, scores_at_once(q) // (rows * widest))
    tile_order, widths = runs_by_width(ranges.width.flatten(), widest, at_once)
    runs = tile_order.split(at_once)[: len(widths)]
    # One gather for all runs: the backward pass of each allocates a gradient of the whole tensor.
    slots = [low[run, None] + torch.arange(width, device=q.device) for run, width in zip(runs, widths, strict=True)]
    wanted = token[torch.cat([x.flatten() for x in slots]).clamp(max=g * n - 1)]
    keys, values = (x.flatten(0, 1).index_select(0, wanted).split([x.numel() for x in slots]) for x in (k, v))
    queries = q.flatten(0, 1).index_select(0, members[torch.cat(runs)].flatten()).view(-1, 1, rows, d)
    parts = []
    for run, width, *tensors in zip(runs, widths, queries.split([len(run) for run in runs]), keys, values, strict=True):
        tile_queries, tile_keys, tile_values = (x.view(len(run), 1, -1, x.shape[-1]) for x in tensors)
        bias = room_bias(room[run], width, q.dtype)
        parts.append(partial_attention(tile_queries, tile_keys, tile_values, bias=bias))
    out, lse = (torch.cat(x).flatten(0, 2) for x in zip(*parts, strict=True))
    place = inverse(tile_order)[ranges.place // rows + t * heads] * rows + ranges.place % rows
    return out.index_select(0, place.flatten()).view(g, n, -1), lse[place]
