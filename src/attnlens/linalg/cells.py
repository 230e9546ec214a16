"""Cells of keys on a binary tree over the positions, and attention of blocks of queries over listed cells.

A point stands for a set of N tokens by their mean key c, mean value u and N itself, and enters a softmax as
e^{s <q, c> + log N} u. With w the range of s <q, k_j> over its tokens, Hoeffding's lemma gives, for every query,

    0 <= log sum_j e^{s <q, k_j>} - (s <q, c> + log N) <= w^2 / 8,

second order in the radius of the set; the mean value is off by tanh(w / 4) diam(V) at most, first order. The mass of
Gaussian keys with variances x_a is N e^{s <q, c> + s^2 sum_a q_a^2 x_a / 2}: a point with `variance` adds that term.

Leaves are blocks of consecutive tokens; a cell of the next level is two neighbors, and holds the points of both until
they are more than `num_points`, then half as many, each the union of two: of two consecutive ones, or `by_content` of
two that `principal_order` puts side by side. Padding counts 0 and weighs nothing. Time and memory to build all levels
O(n d), times log2 of the points of a cell by content.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.blocks import fold, unfold
from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.principal_order import principal_order


class Cells(NamedTuple):
    """t cells of p points each, heads in the batch axis; `variance` (about the mean, by coordinate) where asked for."""

    keys: Float[Tensor, "bh t p d"]
    values: Float[Tensor, "bh t p dv"]
    num_tokens: Float[Tensor, "#bh t p"]
    variance: Float[Tensor, "bh t p d"] | None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Cells":
        """`change` of every field that is there."""
        variance = None if self.variance is None else change(self.variance)
        return Cells(change(self.keys), change(self.values), change(self.num_tokens), variance)


def token_count(
    key_padding_mask: Bool[Tensor, "b m"] | None, heads: int, length: int, size: int, like: Float[Tensor, "..."]
) -> Float[Tensor, "#bh t s"]:
    """1 for a real token, 0 for padding and for what fills up the last block."""
    if key_padding_mask is None:
        real = torch.ones(1, length, dtype=like.dtype, device=like.device)
    else:
        real = key_padding_mask.to(like.dtype).repeat_interleave(heads, 0)
    return F.pad(real, (0, -length % size)).unflatten(1, (-1, size))


def squared(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """x^2, held where a variance term of two such factors stays finite: infinity less infinity at a hidden cell of the
    future would reach its past."""
    return x.square().clamp_max(torch.finfo(x.dtype).max ** 0.45)


class Refinement(NamedTuple):
    """How a cell is represented: most points of it, whether they carry variances, and what is merged into one."""

    num_points: int
    variance: bool = False
    by_content: bool = False


def leaves(
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    size: int,
    refinement: Refinement,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Cells:
    """Blocks of `size` tokens; padded k and v are zero."""
    count = token_count(key_padding_mask, k.shape[1], k.shape[2], size, k)
    cells = Cells(fold(k, size), fold(v, size), count, None)
    group = -(-size // refinement.num_points)
    if group == 1:
        return cells
    return merge_points(cells.mapped(lambda x: _pad(x, 2, -size % group)), group, refinement)


def parents(cells: Cells, refinement: Refinement) -> Cells:
    """Cells of twice the size; a cell without a sibling gets an empty one."""
    missing = cells.keys.shape[1] % 2
    cells = cells.mapped(lambda x: _pad(x, 1, missing).unflatten(1, (-1, 2)).flatten(2, 3))
    return merge_points(cells, 2, refinement) if cells.keys.shape[2] > refinement.num_points else cells


def merge_points(cells: Cells, group: int, refinement: Refinement) -> Cells:
    """Groups of points as one: means weighted by the counts, variances by the law of total variance."""
    if refinement.by_content:
        order = principal_order(cells.keys, cells.num_tokens, group)
        cells = cells.mapped(lambda x: _ordered(x, order))
    keys, values = (x.unflatten(2, (-1, group)) for x in (cells.keys, cells.values))
    count = cells.num_tokens.unflatten(2, (-1, group))
    total = count.sum(-1)
    weights = (count / total.clamp_min(1)[..., None])[..., None]
    mean = (weights * keys).sum(-2)
    spread = None
    if refinement.variance:
        within = 0 if cells.variance is None else cells.variance.unflatten(2, (-1, group))
        spread = (weights * (squared(keys - mean[..., None, :]) + within)).sum(-2)
    return Cells(mean, (weights * values).sum(-2), total, spread)


def _ordered(x: Tensor, order: Int[Tensor, "bh t p"]) -> Tensor:
    """The points of every cell in `order`."""
    index = order.view(*order.shape, *(1,) * (x.ndim - 3))
    return x.expand(order.shape[0], *x.shape[1:]).take_along_dim(index, 2)


def _pad(x: Tensor, axis: int, missing: int) -> Tensor:
    """`missing` zeros at the end of an axis."""
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing)) if missing else x


def neighbors(num_cells: int, causal: bool, device: torch.device) -> Int[Tensor, "t w"]:
    """The cells beside each, -1 beyond the ends; without its own."""
    own = torch.arange(num_cells, device=device)[:, None]
    offset = torch.arange(-1, 0 if causal else 2, 2, device=device)
    return _inside(own + offset, num_cells)


def interaction_list(num_cells: int, causal: bool, device: torch.device) -> Int[Tensor, "t w"]:
    """The children of the parent and its neighbors, less the cell and its own neighbors; -1 beyond the ends.

    Two before and one after for the second of two siblings, mirrored for the first; causal, those before.
    """
    own = torch.arange(num_cells, device=device)[:, None]
    second = own % 2
    before = torch.cat([own - 2, torch.where(second == 1, own - 3, -1)], 1)
    if causal:
        return _inside(before, num_cells)
    after = torch.cat([own + 2, torch.where(second == 0, own + 3, -1)], 1)
    return _inside(torch.cat([before, after], 1).sort(-1, descending=True).values[:, :3], num_cells)


def all_far(num_cells: int, causal: bool, device: torch.device) -> Int[Tensor, "t w"]:
    """Every cell that is neither the own one nor its neighbor, -1 in their place."""
    own = torch.arange(num_cells, device=device)
    gap = own[:, None] - own
    return torch.where((gap > 1) if causal else (gap.abs() > 1), own.expand(num_cells, -1), -1)


def _inside(index: Int[Tensor, "t w"], num_cells: int) -> Int[Tensor, "t w"]:
    return torch.where((index >= 0) & (index < num_cells), index, -1)


Lists = list[tuple[Cells, Int[Tensor, "t _"]]]


class Level(NamedTuple):
    """Cells of one size, and the cells that the queries in each of them see."""

    size: int
    cells: Cells
    table: Int[Tensor, "t w"]


def listed_attention(
    q: Float[Tensor, "bh t s d"], lists: Lists
) -> tuple[Float[Tensor, "bh t s dv"], Float[Tensor, "bh t s"]]:
    """`(out, lse)` of block i of queries over the points of the cells in row i of each list, where -1 stands for none.

    Points are copied once for every block that lists them.
    """
    scale = q.shape[-1] ** -0.5
    keys = torch.cat([_listed(cells.keys, table) for cells, table in lists], 2)
    values = torch.cat([_listed(cells.values, table) for cells, table in lists], 2)
    bias = torch.cat([_log_counts(cells, table) for cells, table in lists], 2)[:, :, None]
    if any(cells.variance is not None for cells, _ in lists):
        spread = [_listed(torch.zeros_like(c.keys) if c.variance is None else c.variance, table) for c, table in lists]
        q, keys = torch.cat([q, squared(q) * (scale / 2)], -1), torch.cat([keys, torch.cat(spread, 2)], -1)
    return partial_attention(q, keys, values, bias=bias, scale=scale)


def _listed(x: Tensor, table: Int[Tensor, "t w"]) -> Tensor:
    return x.index_select(1, table.clamp_min(0).flatten()).unflatten(1, table.shape).flatten(2, 3)


def _log_counts(cells: Cells, table: Int[Tensor, "t w"]) -> Float[Tensor, "#bh t c"]:
    absent = (table < 0).repeat_interleave(cells.num_tokens.shape[-1], 1)
    return _listed(cells.num_tokens, table).log().masked_fill(absent, -torch.inf)


def far_attention(
    q: Float[Tensor, "b h n d"], levels: Iterable[Level]
) -> list[tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]]:
    """`(out, lse)` of the queries over the lists of all levels, in disjoint parts."""
    h, n, parts = q.shape[1], q.shape[2], []
    for size, lists in _by_tile(levels):
        out, lse = listed_attention(fold(q, size), lists)
        parts.append((unfold(out, h, n), unfold(lse[..., None], h, n)[..., 0]))
    return parts


def _by_tile(levels: Iterable[Level]) -> Iterator[tuple[int, Lists]]:
    """Levels with more points in a list than rows in a cell one by one, all others in one, by the smallest cell's rows.

    Fewer and larger kernels, whose copies of points take no more than the queries do, level by level.
    """
    tile, num_tiles, together = 0, 0, []
    for size, cells, table in levels:
        if table.shape[1] * cells.keys.shape[2] > size:
            yield size, [(cells, table)]
            continue
        if not together:
            tile, num_tiles = size, table.shape[0]
        together.append((cells, table.repeat_interleave(size // tile, 0)[:num_tiles]))
    if together:
        yield tile, together


def near_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    size: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """`(out, lse)` over the tokens of the own block of `size` and of those beside it."""
    h, n = q.shape[1:3]
    tokens = leaves(k, v, size, Refinement(size), key_padding_mask)
    rows, table = fold(q, size), neighbors(tokens.keys.shape[1], causal, q.device)
    if causal:
        own = partial_attention(rows, tokens.keys, tokens.values, causal=True, bias=tokens.num_tokens.log()[:, :, None])
        out, lse = merge(own, listed_attention(rows, [(tokens, table)]))
    else:
        own_cell = torch.arange(table.shape[0], device=q.device)[:, None]
        out, lse = listed_attention(rows, [(tokens, torch.cat([table, own_cell], 1))])
    return unfold(out, h, n), unfold(lse[..., None], h, n)[..., 0]


def point_exponents(q: Float[Tensor, "b h n d"], cells: Cells) -> Float[Tensor, "b h n c"]:
    """s <q_i, c> + log N_c and the variance term, for every row and point, materialized: for analysis."""
    b, h = q.shape[:2]
    scale = q.shape[-1] ** -0.5
    keys = cells.keys.flatten(1, 2).unflatten(0, (b, h))
    exponent = q @ keys.mT * scale
    if cells.variance is not None:
        spread = cells.variance.flatten(1, 2).unflatten(0, (b, h))
        exponent = exponent + squared(q) @ spread.mT * (scale**2 / 2)
    count = cells.num_tokens.flatten(1, 2).expand(b * h, -1).unflatten(0, (b, h))
    return exponent + count.clamp_min(1).log()[:, :, None]


def visible_points(table: Int[Tensor, "t w"], num_points: int) -> Bool[Tensor, "t c"]:
    """Which points, counted over all cells, are in the list of every cell."""
    own = torch.arange(table.shape[0], device=table.device)
    return (table[..., None] == own).any(1).repeat_interleave(num_points, 1)
