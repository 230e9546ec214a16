"""Fast multipole attention: keys near a query one by one, far groups by p summaries with learned weights.

The geometry is that of `hierarchical`: leaves of m tokens, groups of 2^l m tokens on level l, and on every level the
interaction list (children of the parent's neighbors that are not the group's own neighbors). A group is cut into p runs
of g_l = 2^l g_0 consecutive tokens, g_0 = ceil(m / p), and run c has

    key_c = sum_{j in c} a^l_j k_j,   value_c = sum_{j in c} e^l_j v_j,   a^l = softmax(alpha^l),

e^l = softmax(epsilon^l), over its N_c real tokens, and enters with N_c e^{s <q_i, key_c>}, s = 1/sqrt(d).

alpha^l and epsilon^l, of shape (heads, g_l), are learned, one pair a level and shared by all runs of it, as the kernel
of a convolution with stride g_l. They start at zero: the means of `hierarchical`. What differs from it after training:
weights within a run depend on the place and are other ones for keys, for values, and on every level; there a coarser
point is the mean of two finer ones, all tokens weigh the same, and nothing is learned.

Time O(n (m + p log(n / m)) d), memory O(n d log(n / m)). Equals softmax attention when m >= n, or p >= n. Causal: the
triangle of the own leaf, the leaf before, and groups wholly in the past. The bound of `linalg.cell_bound` holds for any
weights; it is second order in the masses only while keys are weighed equally.

Source: "Fast Multipole Attention: A Scalable Multilevel Attention Mechanism for Text and Images" (Kang, Tran, De
Sterck, 2023), https://arxiv.org/abs/2310.11960. Departures: weights are positive, sum to one and count the tokens, so
that rows sum to one and padding weighs nothing; queries are not down-sampled (the paper's O(n log n) variant); a level
for every doubling, so that `max_length` decides how many there are.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import fold
from attnlens.linalg.cell_bound import Points, cell_bound
from attnlens.linalg.cells import (
    Cells,
    Level,
    far_attention,
    interaction_list,
    near_attention,
    point_exponents,
    token_count,
    visible_points,
)
from attnlens.linalg.partial import merge, partial_attention


def summaries(
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    size: int,
    weights: Float[Tensor, "2 h g"],
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Cells:
    """Groups of `size` tokens in runs of g, each by its weighted key and value; padded k and v are zero."""
    b, h, n = k.shape[:3]
    group = weights.shape[-1]
    missing = -size % group
    count = token_count(key_padding_mask, h, n, size, k)
    real = F.pad(count, (0, missing)).unflatten(2, (-1, group))
    levels = weights.to(k.dtype).repeat(1, b, 1)[:, :, None, None]
    # Hidden before the softmax: beside a padded token of large weight all others may underflow.
    shares = torch.softmax(levels.masked_fill(real == 0, torch.finfo(k.dtype).min), -1) * real
    shares = shares / torch.where(real.sum(-1) > 0, shares.sum(-1), 1)[..., None]
    keys, values = (
        (share[..., None, :] @ F.pad(fold(x, size), (0, 0, 0, missing)).unflatten(2, (-1, group))).squeeze(-2)
        for x, share in zip((k, v), shares, strict=True)
    )
    return Cells(keys, values, real.sum(-1), None)


def far_levels(
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    block_size: int,
    weights: Sequence[Tensor],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Iterator[Level]:
    """Levels while some group is far from another, each from the tokens themselves."""
    for level in range(num_levels(k.shape[2], block_size)):
        size = block_size << level
        cells = summaries(k, v, size, weights[level], key_padding_mask)
        yield Level(size, cells, interaction_list(cells.keys.shape[1], causal, k.device))


def num_levels(length: int, block_size: int) -> int:
    """Levels that have three groups or more."""
    level = 0
    while -(-length // (block_size << level)) > 2:
        level += 1
    return level


def runs(
    weights: Float[Tensor, "h g"],
    k: Float[Tensor, "b h n d"],
    size: int,
    num_points: int,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Int[Tensor, "b h n"], Float[Tensor, "b h c"]]:
    """The run of every token and the range, over its real tokens, of the weights before their softmax: for analysis."""
    b, h, n = k.shape[:3]
    position = torch.arange(n, device=k.device)
    group, place = weights.shape[-1], position % size
    owner = (position // size * num_points + place // group).expand(b, h, n)
    level = weights[:, place % group].expand(b, h, n)
    real = torch.ones_like(level, dtype=torch.bool)
    real = real if key_padding_mask is None else real & key_padding_mask[:, None]
    empty = torch.full_like(level[..., :1], -torch.inf).expand(b, h, -(-n // size) * num_points)
    most, least = (empty.scatter_reduce(-1, owner, x.masked_fill(~real, -torch.inf), "amax") for x in (level, -level))
    return owner, torch.where(most > -torch.inf, most + least, 0)


def fast_multipole_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    block_size: int,
    weights: Sequence[Tensor],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Near leaves and the levels of the far field, merged by their log-sum-exp; `weights` before their softmax."""
    mask = key_padding_mask
    if block_size >= k.shape[2]:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=mask)[0]
    near = near_attention(q, k, v, block_size, causal=causal, key_padding_mask=mask)
    levels = far_levels(k, v, block_size, weights, causal=causal, key_padding_mask=mask)
    return merge(near, *far_attention(q, levels))[0]


class FastMultipole(AbstractAttention):
    """Multilevel attention with learned down-sampling of keys and values.

    Args:
        block_size: tokens of a leaf, at least 1; a query sees up to three leaves token by token.
        num_summaries: most summaries of a far group, at least 1.
        num_heads: each has its own weights.
        max_length: longest sequence, which decides the number of levels.
    """

    family = "hierarchical"
    budget = "block_size"
    self_attention = True
    row_stochastic = True

    def __init__(self, block_size: int, num_summaries: int, num_heads: int, max_length: int) -> None:
        super().__init__()
        for name, value in (("block_size", block_size), ("num_summaries", num_summaries)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.block_size, self.max_length = block_size, max_length
        group = -(-block_size // num_summaries)
        self.weights = nn.ParameterList(
            torch.zeros(2, num_heads, group << level) for level in range(num_levels(max_length, block_size))
        )

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
        """The bound of `cell_bound`, at the weights as they are."""
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            q, k, v = (torch.where(real, x, 0) for x in (q, k, v))
        parts, weights = [], self._weights(k.shape[2])
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        for level, (size, cells, table) in enumerate(far_levels(k, v, self.block_size, weights, **masks)):
            owner, weight_range = runs(weights[level][1].to(k.dtype), k, size, cells.keys.shape[2], key_padding_mask)
            visible = visible_points(table, cells.keys.shape[2]).repeat_interleave(size, 0)[None, None, : k.shape[2]]
            parts.append(Points(owner, visible, point_exponents(q, cells), weight_range))
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
        weights = self._weights(k.shape[2])
        return fast_multipole_attention(
            q, k, v, self.block_size, weights, causal=causal, key_padding_mask=key_padding_mask
        )

    def _weights(self, length: int) -> list[Tensor]:
        if num_levels(length, self.block_size) > len(self.weights):
            raise ValueError(
                f"length {length} has more levels than `max_length`={self.max_length}, for which weights were made; "
                "construct the operator with a larger `max_length`"
            )
        return list(self.weights)
