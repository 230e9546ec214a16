r"""Multipole attention: exact on the keys of a query's best clusters, every other cluster counted as its mean.

Keys are put into clusters by k-means: N_c keys with mean key c and mean value vbar_c. A query scores the clusters by
their estimated mass N_c e^{s <q, c>}, s = 1/sqrt(d), and opens the best, O, that hold B keys at most in all:

    out = (sum_{j in O} e^{s <q, k_j>} v_j + sum_{c not in O} N_c e^{s <q, c>} vbar_c)
        / (sum_{j in O} e^{s <q, k_j>}     + sum_{c not in O} N_c e^{s <q, c>}).

Time O(n (C d + C log C + B d)) and O(iterations n c d) for k-means, with c clusters a window and C = c ceil(n / window)
in all; memory O(n (C + B + d)). Equals softmax attention when B >= n, and when every key is a cluster.

A cluster's mass is never overestimated, N_c e^{s <q, c>} <= sum_j e^{s <q, k_j>}, and is right to second order in
s |q| rad_c, its mean value to first order. With `first_order`, (1/N_c) sum_j (v_j - vbar_c)(k_j - c)^T s q is added to
vbar_c, weights N_c e^{s <q, c>} become e^{s <q, c>} (1 + s <q, k_j - c>), and the value is right to second order too:
a d x d_v matrix a cluster, time O(n C d d_v).

- Windows: only keys of the same `window` positions are clustered together.
- Causal: the own block of `block_size` positions is exact, and merged by log-sum-exp with the clusters of the blocks
  before it. With a `block_size` below `window` clustering is online: a block that is complete is appended to its
  window, with window / block_size parts of `num_clusters`, and the window refined. Blocks read nothing of later ones.
- Two levels, with `num_coarse`: clusters are clustered again, a query scores the coarse ones, opens the best up to
  `num_fine` clusters, and of these opens the best up to B keys.
- Windowed rotary positions, with `rope_base`: keys are clustered, scored and counted as if all stood `rope_distance`
  from the query. Keys that are opened, or in the own block, have their true positions. The mass may then err both ways.

Clusters and choices are constants for the gradient, means are not.

Source: "Multipole Attention for Efficient Long Context Reasoning" (Hooper et al., 2025),
https://arxiv.org/abs/2506.13059. Departures: the survey's score leaves its own cluster out of the denominator, which
changes the order and fails with one cluster; `by_mass=False` takes the order of <q, c>, the score with all clusters in
it. Clusters that have more keys than the budget has left are skipped once, where the published code stops at the first.
A coarse cluster's mean and N count keys (published code: clusters). No attention sinks apart. The published operator
decodes; here all blocks of a sequence are done in one call, in either direction.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.band import from_blocks, hidden_keys, to_blocks
from attnlens.linalg.cluster_bound import cluster_bound, diameters, standing_for
from attnlens.linalg.clusters import Field, Levels, one_level, two_levels
from attnlens.linalg.dense import softmax_round_off, softmax_weights
from attnlens.linalg.key_windows import Clustering, all_windows, past_windows
from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.selected import selected_attention, value_diameter
from attnlens.linalg.windowed_rope import windowed_rotation


def own_block(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    size: int,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Causal `(out, lse)` of every row over its own block."""
    bias = None
    if key_padding_mask is not None:
        hidden = hidden_keys(key_padding_mask, q.shape[2], size, q)
        bias = None if hidden is None else hidden.flatten(0, 1)[:, None, None]
    rows, keys, values = (to_blocks(x, size).flatten(0, 1) for x in (q, k, v))
    out, lse = partial_attention(rows, keys, values, causal=True, bias=bias)
    out, lse = (x.unflatten(0, (q.shape[0], -1)) for x in (out, lse[..., None]))
    return from_blocks(out, q.shape[2]), from_blocks(lse, q.shape[2])[..., 0]


def opened_keys(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m dv"], fields: list[Field]
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """`(out, lse)` of every row over the keys that it opens; the rows of the fields follow each other."""
    width = max(field.keys.members.shape[-1] for field in fields)

    def rows(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1]))

    index = torch.cat([rows(field.keys.members) for field in fields], 2)
    filled = torch.cat([rows(field.keys.filled) for field in fields], 2)
    return selected_attention(q, k, v, index, filled)


class Multipole(AbstractAttention):
    """Multipole attention.

    Args:
        num_keys: B, keys that a query opens at most, at least 1.
        num_clusters: c, clusters of a window.
        window: positions whose keys are clustered together.
        head_dim: of queries and keys.
        num_heads: each has its own direction of the start of k-means.
        seed: of the directions.
        block_size: causal, positions after which clusters are updated; it must divide `window`, into a number of
            blocks that divides `num_clusters`. By default it is `window`.
        iterations: of k-means, at least 1.
        by_mass: whether clusters are scored by N_c e^{s <q, c>}, or by e^{s <q, c>}.
        first_order: whether values of a cluster vary with the query, see above; with one level only.
        num_coarse: coarse clusters of a window, for two levels.
        num_fine: clusters that a query scores at most, for two levels.
        rope_base: of the rotation that queries and keys have gone through, for windowed rotary positions.
        rope_distance: from a query at which keys in clusters stand, given with `rope_base`.
    """

    family = "clustering"
    budget = "num_keys"
    row_stochastic = True

    def __init__(
        self,
        num_keys: int,
        num_clusters: int,
        window: int,
        head_dim: int,
        num_heads: int,
        seed: int,
        block_size: int | None = None,
        iterations: int = 3,
        by_mass: bool = True,
        first_order: bool = False,
        num_coarse: int | None = None,
        num_fine: int | None = None,
        rope_base: float | None = None,
        rope_distance: int | None = None,
    ) -> None:
        super().__init__()
        self.num_keys, self.num_clusters, self.window, self.iterations = num_keys, num_clusters, window, iterations
        self.block_size = window if block_size is None else block_size
        self.by_mass, self.first_order = by_mass, first_order
        self.num_coarse, self.num_fine = num_coarse, num_fine
        self.rope_base, self.rope_distance = rope_base, rope_distance
        self._check_arguments()
        self.clustering = Clustering(num_clusters, window, self.block_size, iterations, first_order, num_coarse)
        # The first order of e^x, 1 + x, may be negative.
        self.row_stochastic = not first_order  # pyright: ignore[reportAttributeAccessIssue]
        generator = torch.Generator().manual_seed(seed)
        self.direction: Tensor
        self.register_buffer("direction", torch.randn(num_heads, head_dim, generator=generator, device="cpu"))

    def _check_arguments(self) -> None:
        for name in ("num_keys", "num_clusters", "window", "block_size", "iterations", "num_coarse", "num_fine"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if self.window % self.block_size or self.num_clusters % (self.window // self.block_size):
            raise ValueError(
                "`block_size` must divide `window`, and the number of blocks `num_clusters`, got "
                f"{self.block_size}, {self.window} and {self.num_clusters}"
            )
        for one, other in (("num_coarse", "num_fine"), ("rope_base", "rope_distance")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"`{one}` and `{other}` belong together, give both or neither")
        if self.first_order and self.num_coarse is not None:
            raise ValueError("`first_order` has one level only, leave `num_coarse` and `num_fine` out")

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every cluster opened."""
        return {"num_keys": length}

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        if self.num_keys >= k.shape[2]:
            return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
        fields = [field for field, _ in self.fields(q, k, v, causal, key_padding_mask)]
        first = self.block_size if causal else 0
        parts = [own_block(q, k, v, self.block_size, key_padding_mask)] if causal else []
        if not fields:
            return parts[0][0]
        out, lse = zip(*(field.far for field in fields), strict=True)
        far = torch.cat(out, 2), torch.cat(lse, 2)
        near = opened_keys(q[:, :, first:], k, v, fields)
        rest = merge(far, near, *((out[:, :, first:], lse[:, :, first:]) for out, lse in parts))[0]
        return torch.cat([*(out[:, :, :first] for out, _ in parts), rest], 2)

    def fields(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Iterator[tuple[Field, Levels]]:
        """What clusters give the rows: of all of them in one, or causal, of every block from the second on."""
        if self.rope_base is not None and self.rope_distance is not None:
            if q.shape[2] != k.shape[2]:
                raise ValueError(
                    f"`rope_base` needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}: their places are "
                    "the angles by which they were rotated"
                )
            q, k = windowed_rotation(q, k, self.rope_base, self.rope_distance)
        if not causal:
            yield self._expand(q, all_windows(k, v, self.direction, self.clustering, key_padding_mask))
            return
        size = self.block_size
        past = past_windows(k, v, self.direction, self.clustering, key_padding_mask)
        for t, levels in enumerate(past, start=1):
            yield self._expand(q[:, :, t * size : (t + 1) * size], levels)

    def _expand(self, q: Float[Tensor, "b h n d"], levels: Levels) -> tuple[Field, Levels]:
        fine, coarse = levels
        if coarse is None or self.num_fine is None:
            return one_level(q, fine, self.num_keys, self.by_mass), levels
        return two_levels(q, coarse, fine, self.num_fine, self.num_keys, self.by_mass), levels

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """Errors within and among clusters, by `cluster_bound`, and round-off; from the dense matrices: analysis."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        if key_padding_mask is not None:
            k, v = (torch.where(key_padding_mask[:, None, :, None], x, 0) for x in (k, v))
        bound = softmax_round_off(q, k, v).double()
        if self.num_keys >= k.shape[2]:
            return bound.to(q.dtype)
        values = v.double()
        weights, found = softmax_weights(q.double(), k.double(), **masks), self.matrix(q, k, **masks).double()
        widest = value_diameter(values, **masks).expand(*q.shape[:3])
        begin = self.block_size if causal else 0
        for field, (fine, coarse) in self.fields(q, k, v, causal, key_padding_mask):
            node, of_fine, of_coarse = standing_for(field, fine, coarse, k.shape[2])
            nodes = [diameters(values, of_fine, fine.size.shape[-1])]
            if coarse is not None:
                nodes.append(diameters(values, of_coarse, coarse.size.shape[-1]))
            rows = slice(begin, begin + node.shape[2])
            both = weights[:, :, rows], found[:, :, rows]
            bound[:, :, rows] += cluster_bound(*both, node, torch.cat(nodes, -1), widest[:, :, rows])
            begin = rows.stop
        return bound.to(q.dtype)
