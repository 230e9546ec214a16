"""k-means on the tokens of every example and head: batched, deterministic, blind to padding.

Lloyd's iteration alternates

    cluster(j) = argmin_c |x_j - mu_c|  (the first of equal ones),    mu_c = mean of the x_j of cluster c,

from rows at the midpoints of C equal parts in the order of a random projection; rows at even distances in the sequence
would all start in one cluster where the sequence has a period. An empty cluster keeps its center. Nothing reduces over
the batch, shapes depend on sizes alone, and padding belongs to cluster C, one beyond the last. Time
O(iterations n C d), memory O(n (C + d)). Assignments carry no gradient; the centers that `k_means` returns are means of
the rows given, and do.

Sources: "Least squares quantization in PCM" (Lloyd, 1982); the choice of the start is our own.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.blocks import real_first, take_rows


def cluster_means(
    x: Float[Tensor, "b h n d"], cluster: Int[Tensor, "b h n"], start: Float[Tensor, "b h c d"]
) -> Float[Tensor, "b h c d"]:
    """The mean of the rows of every cluster, and the row of `start` where a cluster is empty; rows of a cluster beyond
    the last (padding) enter none."""
    b, h, c, d = start.shape
    first = (torch.arange(b * h, device=x.device) * (c + 1)).view(b, h, 1)
    place = (cluster + first).flatten()
    # One spare cluster a head takes the padding.
    total = x.new_zeros(b * h * (c + 1), d).index_add(0, place, x.reshape(-1, d))
    count = x.new_zeros(b * h * (c + 1)).index_add(0, place, x.new_ones(place.shape))
    total, count = total.view(b, h, c + 1, d)[:, :, :c], count.view(b, h, c + 1, 1)[:, :, :c]
    return torch.where(count > 0, total / count.clamp_min(1), start)


def spread_rows(
    x: Float[Tensor, "b h n d"], direction: Float[Tensor, "h d"], num_rows: int, mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b h c d"]:
    """The real rows at the midpoints of `num_rows` equal parts in the order of <x, direction>; all, if they are few."""
    order = real_first((x @ direction.to(x.dtype)[..., None])[..., 0], mask)
    count = torch.full_like(order[..., :1], x.shape[2]) if mask is None else mask.sum(-1).clamp_min(1)[:, None, None]
    rank = (2 * torch.arange(num_rows, device=x.device) + 1) * count // (2 * num_rows)
    return take_rows(x, order.gather(-1, rank.expand(*x.shape[:2], -1)))


def k_means(
    x: Float[Tensor, "b h n d"],
    direction: Float[Tensor, "h d"],
    num_clusters: int,
    iterations: int,
    mask: Bool[Tensor, "b n"] | None,
) -> tuple[Int[Tensor, "b h n"], Float[Tensor, "b h c d"]]:
    """Cluster and centroids after Lloyd's iterations; padding gets cluster C."""
    fixed = x.detach()
    centers = spread_rows(fixed, direction, num_clusters, mask)
    cluster = nearest(fixed, centers, mask)
    for _ in range(iterations - 1):
        centers = cluster_means(fixed, cluster, centers)
        cluster = nearest(fixed, centers, mask)
    return cluster, cluster_means(x, cluster, centers)


def nearest(
    x: Float[Tensor, "b h n d"],
    centers: Float[Tensor, "b h c d"],
    mask: Bool[Tensor, "b n"] | None,
    alive: Bool[Tensor, "b c"] | None = None,
) -> Int[Tensor, "b h n"]:
    """The nearest center of every row, among those `alive`; padding gets cluster C."""
    score = x @ centers.mT - centers.square().sum(-1)[:, :, None] / 2
    if alive is not None:
        score = score.masked_fill(~alive[:, None, None], -torch.inf)
    cluster = score.argmax(-1)
    return cluster if mask is None else torch.where(mask[:, None], cluster, centers.shape[2])
