"""H-Transformer-1D: keys near a query one by one, keys farther away as means over ever larger cells.

The sequence is cut into leaves of b tokens, pairs of leaves are cells of level 1, and so on. A query in cell I of
level l sees the cells of its interaction list there: the children of the parent's neighbors, less I and its own
neighbors. What is left at the bottom, its own leaf and the two beside it, it sees token by token. So every key is met
once, in a cell whose distance is at least its size, and a cell of size 2^l b is represented by at most r points (mean
key c, mean value u, count N):

    out_i = (sum_{j near} e^{s <q_i, k_j>} v_j + sum_l sum_{c in L_l(i)} N_c e^{s <q_i, c> + x_ic} u_c)
          / (sum_{j near} e^{s <q_i, k_j>}     + sum_l sum_{c in L_l(i)} N_c e^{s <q_i, c> + x_ic}),    s = 1/sqrt(d),

with x_ic = 0, or with `variance` s^2 sum_a q_ia^2 Var_a(c) / 2, which makes the mass right to second order for keys
with uncorrelated coordinates. Causal: the triangle of the own leaf, the leaf before, and of each list what lies before.

The first `num_sinks` keys are in no cell: every row sees them one by one. Trained models put much of their weight on
the first token, which no cell of its neighbors can stand for.

Time O(n (b + s + r log(n / b)) d) with s sinks, memory O(n d log(n / b)): a row meets at most 3 b + s keys and 3 r
points a level, 2 b + s and 2 r causal. Equals softmax attention when b >= n, or r >= n.

The error is bounded in `linalg.cell_bound`: of the masses second order, of the values first order in the range of the
scores within a cell.

Source: "H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences" (Zhu, Soricut, 2021),
https://arxiv.org/abs/2107.11906. Departures: queries are not averaged (the paper's are, O(n b d) in all, and its error
then has a part in the queries; averaged queries of a block also leak within it when causal); r is an argument, in the
paper it is b; the normalizer counts N_c for a cell, so that rows sum to one. `variance`, sinks, and `by_content`, which
merges points that are near in space rather than in the sequence, are added here.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.cell_bound import Points, cell_bound
from attnlens.linalg.cells import (
    Level,
    Refinement,
    all_far,
    far_attention,
    interaction_list,
    leaves,
    near_attention,
    parents,
    point_exponents,
    visible_points,
)
from attnlens.linalg.partial import merge, partial_attention


def without_sinks(
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    num_sinks: int,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"], Bool[Tensor, "b n"] | None]:
    """Keys, values and mask with the sinks as padding."""
    if num_sinks == 0:
        return k, v, key_padding_mask
    rest = torch.arange(k.shape[2], device=k.device) >= num_sinks
    mask = rest.expand(k.shape[0], -1) if key_padding_mask is None else key_padding_mask & rest
    return torch.where(rest[:, None], k, 0), torch.where(rest[:, None], v, 0), mask


def far_levels(
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    block_size: int,
    refinement: Refinement,
    num_levels: int | None,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Iterator[Level]:
    """Level by level from the leaves; the lists of the last of `num_levels` hold all that is left."""
    size, level = block_size, 1
    cells = leaves(k, v, size, refinement, key_padding_mask)
    while (num_cells := cells.keys.shape[1]) > 2:
        last = level == num_levels
        yield Level(size, cells, (all_far if last else interaction_list)(num_cells, causal, k.device))
        if last:
            return
        size, level, cells = 2 * size, level + 1, parents(cells, refinement)


def hierarchical_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    block_size: int,
    refinement: Refinement,
    num_levels: int | None = None,
    num_sinks: int = 0,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Sinks, near leaves and the levels of the far field, merged by their log-sum-exp."""
    n, mask = q.shape[2], key_padding_mask
    if max(block_size, num_sinks) >= n:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=mask)[0]
    parts = []
    if num_sinks > 0:
        first = None if mask is None else mask[:, :num_sinks]
        sinks = k[:, :, :num_sinks], v[:, :, :num_sinks]
        parts.append(partial_attention(q, *sinks, causal=causal, key_padding_mask=first))
    k, v, mask = without_sinks(k, v, num_sinks, mask)
    parts.append(near_attention(q, k, v, block_size, causal=causal, key_padding_mask=mask))
    levels = far_levels(k, v, block_size, refinement, num_levels, causal=causal, key_padding_mask=mask)
    return merge(*parts, *far_attention(q, levels))[0]


class Hierarchical(AbstractAttention):
    """Attention on a binary tree of cells.

    Args:
        block_size: tokens of a leaf, at least 1; a query sees up to three leaves token by token.
        num_points: most points that represent a cell, at least 1; by default `block_size`, as in the paper, where the
            error begins with the cells of two leaves.
        num_levels: levels of cells, at least 1; by default as many as the length has. With fewer, a query sees all
            far cells of the last level, at quadratic cost.
        variance: whether the mass of a point is corrected for the variance of its keys; doubles the width of far keys.
        by_content: whether points are merged by nearness in space within their cell rather than in the sequence.
        num_sinks: first positions that every row sees token by token, at least 0.
    """

    family = "hierarchical"
    budget = "block_size"
    self_attention = True
    row_stochastic = True

    def __init__(
        self,
        block_size: int,
        num_points: int | None = None,
        num_levels: int | None = None,
        variance: bool = False,
        by_content: bool = False,
        num_sinks: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("block_size", block_size), ("num_points", num_points), ("num_levels", num_levels)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if num_sinks < 0:
            raise ValueError(f"`num_sinks` must be at least 0, got {num_sinks}")
        self.block_size, self.num_levels, self.num_sinks = block_size, num_levels, num_sinks
        self.refinement = Refinement(block_size if num_points is None else num_points, variance, by_content)

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With one leaf."""
        return {"block_size": length}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """The bound of `cell_bound`, with the tokens of each point read off the levels of the identity."""
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            q, k, v = (torch.where(real, x, 0) for x in (q, k, v))
        n, parts = q.shape[2], []
        eye = torch.eye(n, dtype=k.dtype, device=k.device).expand(*k.shape[:2], n, n)
        keys, eye, mask = without_sinks(k, eye, self.num_sinks, key_padding_mask)
        kinds = self.block_size, self.refinement, self.num_levels
        for size, cells, table in far_levels(keys, eye, *kinds, causal=causal, key_padding_mask=mask):
            owner = cells.values.flatten(1, 2).argmax(1).view(*k.shape[:2], n)
            exponent = F.pad(point_exponents(q, cells), (0, 1))
            # One point more, which owns the sinks and which no row sees.
            owner[..., : self.num_sinks] = exponent.shape[-1] - 1
            visible = visible_points(table, cells.keys.shape[2]).repeat_interleave(size, 0)[None, None, :n]
            parts.append(Points(owner, F.pad(visible, (0, 1)), exponent, torch.zeros_like(exponent[:, :, 0])))
        return cell_bound(parts, q, k, v, causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        kinds = self.block_size, self.refinement, self.num_levels, self.num_sinks
        return hierarchical_attention(q, k, v, *kinds, causal=causal, key_padding_mask=key_padding_mask)
