"""k-median on the tokens of every example and head: the sum of distances in place of the sum of their squares.

The iteration alternates

    cluster(j) = argmin_c |x_j - mu_c|_1,    mu_c = coordinate by coordinate, the median of the x_j of cluster c,

each of which does not raise sum_j |x_j - mu_cluster(j)|_1. Few far points move a median little, where they draw a mean.
It starts as `kmeans` does, an empty cluster keeps its center, and padding belongs to cluster C, one beyond the last.
Time O(iterations n d (C + log n)), memory O(n d + C d). No gradient.

Source: "Clustering via Concave Minimization" (Bradley, Mangasarian, Street, 1996).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.kmeans import spread_rows

ROWS = 256


def cluster_medians(
    x: Float[Tensor, "b h n d"], cluster: Int[Tensor, "b h n"], start: Float[Tensor, "b h c d"]
) -> Float[Tensor, "b h c d"]:
    """The coordinatewise median of every cluster, and the row of `start` where a cluster is empty."""
    clusters = start.shape[2]
    values, order = x.sort(dim=2)
    label = cluster[..., None].expand(x.shape).gather(2, order)
    # Stable: by cluster, and within a cluster by value.
    values = values.gather(2, label.argsort(dim=2, stable=True))
    count = torch.zeros(*cluster.shape[:2], clusters + 1, dtype=torch.long, device=x.device)
    count = count.scatter_add(-1, cluster, torch.ones_like(cluster))
    first = (count.cumsum(-1) - count)[..., :clusters, None]
    count = count[..., :clusters, None]
    middle = [first + (count - 1).clamp_min(0) // 2, first + count // 2]
    low, high = (values.gather(2, at.clamp_max(x.shape[2] - 1).expand(start.shape)) for at in middle)
    return torch.where(count > 0, (low + high) / 2, start)


def nearest_l1(
    x: Float[Tensor, "b h n d"], centers: Float[Tensor, "b h c d"], mask: Bool[Tensor, "b n"] | None
) -> Int[Tensor, "b h n"]:
    """The nearest center of every row in the l1 norm, `ROWS` rows at a time; padding gets cluster C."""
    parts = [torch.cdist(rows, centers, p=1.0).argmin(-1) for rows in x.split(ROWS, 2)]
    cluster = torch.cat(parts, -1)
    return cluster if mask is None else torch.where(mask[:, None], cluster, centers.shape[2])


@torch.no_grad()
def k_medians(
    x: Float[Tensor, "b h n d"],
    direction: Float[Tensor, "h d"],
    num_clusters: int,
    iterations: int,
    mask: Bool[Tensor, "b n"] | None,
) -> tuple[Int[Tensor, "b h n"], Float[Tensor, "b h c d"]]:
    """Cluster and centers after `iterations` assignments; padding gets cluster C."""
    centers = spread_rows(x, direction, num_clusters, mask)
    cluster = nearest_l1(x, centers, mask)
    for _ in range(iterations - 1):
        centers = cluster_medians(x, cluster, centers)
        cluster = nearest_l1(x, centers, mask)
    return cluster, cluster_medians(x, cluster, centers)
