"""Clusters of keys that stand for their members until a query opens them.

A cluster of N keys with mean c and mean value vbar gives a query the mass and the values

    N e^{s <q, c>},    vbar + M^T (s q),    M = 1/N sum_j (k_j - c)(v_j - vbar)^T  (first order, left out by default),

in place of sum_j e^{s <q, k_j>} and the softmax mean of its values. With x_j = s <q, k_j - c>, of mean zero, the first
order is e^{x_j} ~ 1 + x_j. A query opens clusters in the order of their scores, as many as have no more members than
it has slots: shapes are static, whatever the sizes are. A cluster that is opened is replaced by its members, which are
keys, or clusters again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.blocks import take_rows
from attnlens.linalg.kmeans import cluster_means, k_means
from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.selected import ROWS, selected_attention

PASSES = 2


class Clusters(NamedTuple):
    """c clusters of a head, over m members.

    centers, values: means over the keys below; of an empty cluster they mean nothing.
    size: keys below, 0 if empty.
    members: what opening gives; equals `size` where members are keys.
    start: the first member, counted in `order`.
    order: members, cluster by cluster.
    moments: M, or None.
    """

    centers: Float[Tensor, "b h c d"]
    values: Float[Tensor, "b h c dv"]
    size: Int[Tensor, "b h c"]
    members: Int[Tensor, "b h c"]
    start: Int[Tensor, "b h c"]
    order: Int[Tensor, "b h m"]
    moments: Float[Tensor, "b h c d dv"] | None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Clusters":
        """`change` of every field that is there."""
        moments = None if self.moments is None else change(self.moments)
        return Clusters(*(change(x) for x in self[:-1]), moments=moments)

    def first(self, clusters: int, members: int) -> "Clusters":
        """The first so many clusters, of the first so many places of `order`."""
        return self.mapped(lambda x: x[:, :, :clusters])._replace(order=self.order[:, :, :members])

    def of_window(self, batch: int, window: int, size: int) -> "Clusters":
        """Clusters of one window from those of all, which stand in the batch axis; windows have `size` members."""
        one = self.mapped(lambda x: x.unflatten(0, (batch, -1))[:, window])
        return one._replace(start=one.start + window * size, order=one.order + window * size)

    def of_windows(self, batch: int) -> "Clusters":
        """Clusters of all windows side by side, from windows in the batch axis."""
        size, num_windows = self.order.shape[-1], self.order.shape[0] // batch
        by = (torch.arange(num_windows, device=self.order.device) * size).repeat(batch)[:, None, None]
        moved = self._replace(start=self.start + by, order=self.order + by)
        return moved.mapped(lambda x: x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3))

    def joined(self, other: "Clusters") -> "Clusters":
        """Both side by side, the members of `other` after these."""
        moments = None
        if self.moments is not None and other.moments is not None:
            moments = torch.cat([self.moments, other.moments], 2)
        pairs = zip(self[:-1], other[:-1], strict=True)
        return Clusters(*(torch.cat(pair, 2) for pair in pairs), moments=moments)


class Levels(NamedTuple):
    """Clusters of keys, and clusters of those, or None."""

    fine: Clusters
    coarse: Clusters | None


def counts(cluster: Int[Tensor, "b h m"], num_clusters: int) -> Int[Tensor, "b h c"]:
    """Members of every cluster; those beyond the last (padding) are left out."""
    zeros = torch.zeros(*cluster.shape[:2], num_clusters + 1, dtype=torch.long, device=cluster.device)
    return zeros.scatter_add(-1, cluster, torch.ones_like(cluster))[..., :-1]


def clusters_of_keys(
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    cluster: Int[Tensor, "b h m"],
    num_clusters: int,
    *,
    first_order: bool = False,
) -> Clusters:
    """Clusters from the cluster of every key; differentiable in k and v."""
    c = num_clusters
    centers = cluster_means(k, cluster, torch.zeros_like(k[:, :, :1]).expand(-1, -1, c, -1))
    values = cluster_means(v, cluster, torch.zeros_like(v[:, :, :1]).expand(-1, -1, c, -1))
    moments = None
    if first_order:
        at = cluster.clamp_max(c - 1)
        products = (k - take_rows(centers, at))[..., :, None] * (v - take_rows(values, at))[..., None, :]
        start = torch.zeros_like(products[:, :, :1]).flatten(3).expand(-1, -1, c, -1)
        moments = cluster_means(products.flatten(3), cluster, start).unflatten(3, products.shape[3:])
    size = counts(cluster, c)
    order = cluster.argsort(dim=-1, stable=True)
    return Clusters(centers, values, size, size, size.cumsum(-1) - size, order, moments)


def clusters_of_clusters(
    fine: Clusters, direction: Float[Tensor, "h d"], num_clusters: int, iterations: int
) -> Clusters:
    """Clusters of the centers of `fine`; centers, values and sizes are those of all keys below."""
    b, h, _, d = fine.centers.shape
    # Which clusters are empty differs from head to head, a mask may differ from example to example only.
    centers = fine.centers.detach().reshape(b * h, 1, -1, d)
    cluster, _ = k_means(centers, direction[:1], num_clusters, iterations, (fine.size > 0).flatten(0, 1))
    cluster = cluster.view(b, h, -1)
    members = counts(cluster, num_clusters)
    zeros = torch.zeros(b, h, num_clusters + 1, dtype=torch.long, device=cluster.device)
    size = zeros.scatter_add(-1, cluster, fine.size)[..., :-1]
    # Sizes in the dtype of the keys before they are divided: a quotient of integers is float32.
    of_cluster = torch.cat([size, torch.ones_like(size[..., :1])], -1).gather(-1, cluster).to(centers.dtype)
    weight = (fine.size.to(centers.dtype) / of_cluster)[..., None]

    def mean(x: Float[Tensor, "b h c e"]) -> Float[Tensor, "b h p e"]:
        total = x.new_zeros(b, h, num_clusters + 1, x.shape[-1])
        return total.scatter_add(2, cluster[..., None].expand_as(x), weight * x)[:, :, :-1]

    start = members.cumsum(-1) - members
    order = cluster.argsort(dim=-1, stable=True)
    return Clusters(mean(fine.centers), mean(fine.values), size, members, start, order, None)


class Opened(NamedTuple):
    """What a row opens: which of its clusters, their members, and which slots hold one."""

    clusters: Bool[Tensor, "b h n c"]
    members: Int[Tensor, "b h n r"]
    filled: Bool[Tensor, "b h n r"]


def open_best(
    score: Float[Tensor, "b h n c"],
    members: Int[Tensor, "b h #n c"],
    start: Int[Tensor, "b h #n c"],
    order: Int[Tensor, "b h m"],
    slots: int,
) -> Opened:
    """The clusters of largest score, of equal ones the first, that the slots have room for; no gradient.

    In each of `PASSES` clusters are taken in order until one has more members than there are slots left; the next pass
    leaves out all that have. A cluster without members may have any score: it takes no slot.
    """
    b, h, n, _ = score.shape
    # Not a descending sort: NaN comes last in this one.
    ranked = (-score.detach()).argsort(dim=-1, stable=True)
    members, start = members.expand_as(ranked), start.expand_as(ranked)
    sizes = members.gather(-1, ranked)
    taken, left = torch.zeros_like(sizes, dtype=torch.bool), torch.full_like(sizes[..., :1], slots)
    for _ in range(PASSES):
        possible = torch.where(taken | (sizes > left), 0, sizes)
        fits = ~taken & (sizes <= left) & (possible.cumsum(-1) <= left)
        taken, left = taken | fits, left - torch.where(fits, sizes, 0).sum(-1, keepdim=True)
    clusters = torch.zeros_like(taken).scatter(-1, ranked, taken)
    sizes = torch.where(taken, sizes, 0)
    end = sizes.cumsum(-1)
    slot = torch.arange(slots, device=score.device).expand(b, h, n, -1).contiguous()
    rank = torch.searchsorted(end, slot, right=True).clamp_max(end.shape[-1] - 1)
    filled = slot < end[..., -1:]
    place = start.gather(-1, ranked.gather(-1, rank)) + slot - (end - sizes).gather(-1, rank)
    place = torch.where(filled, place, 0)
    index = order.gather(-1, place.flatten(2)).view(place.shape)
    return Opened(clusters, index, filled)


def log_sizes(size: Int[Tensor, "*k"], like: Tensor) -> Float[Tensor, "*k"]:
    """log N, and -inf for an empty cluster."""
    return size.to(like.dtype).log()


def centroid_attention(
    q: Float[Tensor, "b h n d"], clusters: Clusters, closed: Bool[Tensor, "b h n c"]
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """`(out, lse)` over the clusters that stay closed, each with the mass and the values of the formula above."""
    bias = log_sizes(clusters.size, q)[:, :, None].masked_fill(~closed, -torch.inf)
    out, lse = partial_attention(q, clusters.centers, clusters.values, bias=bias)
    if clusters.moments is None:
        return out, lse
    scale, parts = q.shape[-1] ** -0.5, []
    moments = clusters.moments.permute(0, 1, 3, 2, 4).flatten(3)
    for begin in range(0, q.shape[2], ROWS):
        rows = slice(begin, begin + ROWS)
        scores = q[:, :, rows] @ clusters.centers.mT * scale + bias[:, :, rows]
        weights = torch.exp(scores - lse[:, :, rows].masked_fill(lse[:, :, rows] == -torch.inf, 0)[..., None])
        slopes = (q[:, :, rows] @ moments * scale).unflatten(-1, (-1, out.shape[-1]))
        parts.append((weights[..., None, :] @ slopes).squeeze(-2))
    return out + torch.cat(parts, 2), lse


def cluster_scores(q: Float[Tensor, "b h n d"], clusters: Clusters, by_mass: bool) -> Float[Tensor, "b h n c"]:
    """s <q, c>, with log N if `by_mass`; no gradient."""
    scores = q.detach() @ clusters.centers.detach().mT * q.shape[-1] ** -0.5
    return scores + log_sizes(clusters.size, q)[:, :, None] if by_mass else scores


class Field(NamedTuple):
    """What rows get of clusters: `(out, lse)` of the closed ones, the keys that they open, and before these the
    clusters of the finer level that they open, if there are two."""

    far: tuple[Tensor, Tensor]
    keys: Opened
    fine: Opened | None


def one_level(q: Float[Tensor, "b h n d"], clusters: Clusters, num_keys: int, by_mass: bool) -> Field:
    """Open clusters of all that there are."""
    scores = cluster_scores(q, clusters, by_mass)
    slots = min(num_keys, clusters.order.shape[-1])
    opened = open_best(scores, clusters.members[:, :, None], clusters.start[:, :, None], clusters.order, slots)
    return Field(centroid_attention(q, clusters, ~opened.clusters), opened, None)


def two_levels(
    q: Float[Tensor, "b h n d"], coarse: Clusters, fine: Clusters, num_fine: int, num_keys: int, by_mass: bool
) -> Field:
    """Open coarse clusters, and of the `num_fine` fine ones at most that this gives, open some in turn."""
    top = one_level(q, coarse, num_fine, by_mass)
    index, filled = top.keys.members, top.keys.filled
    scores = _gathered_scores(q.detach(), fine.centers.detach(), index)
    size = torch.where(filled, fine.size.gather(-1, index.flatten(2)).view(index.shape), 0)
    scores = scores + log_sizes(size, q) if by_mass else scores.masked_fill(~filled, -torch.inf)
    start = fine.start.gather(-1, index.flatten(2)).view(index.shape)
    opened = open_best(scores, size, start, fine.order, min(num_keys, fine.order.shape[-1]))
    # log N enters as one more coordinate of the centers, so that the fused form of chosen keys serves.
    root = q.shape[-1] ** 0.5
    log_size = log_sizes(fine.size.clamp_min(1), q)[..., None] * root
    rows = torch.cat([q, torch.ones_like(q[..., :1])], -1) * ((1 + root**2) ** 0.5 / root)
    centers = torch.cat([fine.centers, log_size], -1)
    middle = selected_attention(rows, centers, fine.values, index, filled & ~opened.clusters)
    return Field(merge(top.far, middle), opened, top.keys)


def _gathered_scores(
    q: Float[Tensor, "b h n d"], centers: Float[Tensor, "b h c d"], index: Int[Tensor, "b h n r"]
) -> Float[Tensor, "b h n r"]:
    """s <q_i, c_j> at the clusters j of each row, gathered for a chunk of rows at a time."""
    parts = []
    for begin in range(0, q.shape[2], ROWS):
        rows = slice(begin, begin + ROWS)
        parts.append((take_rows(centers, index[:, :, rows]) @ q[:, :, rows, :, None]).squeeze(-1))
    return torch.cat(parts, 2) * q.shape[-1] ** -0.5
