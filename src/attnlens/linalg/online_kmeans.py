"""k-means of a window that fills up block by block: append the new rows, then refine the window.

When block g of a window arrives, `num_new` centers start at rows of it, as in `k_means`, each of its rows goes to the
nearest of all centers so far, and a center becomes the running mean of its members,

    mu_c <- (N_c mu_c + sum of its new members) / (N_c + their number),

which is the sequential k-means update for a batch of rows; then Lloyd's iterations run over the whole window. What is
known after block g depends on the blocks up to g alone: a causal method may use it from block g + 1 on. Cost of a
window of G blocks of L rows: O(iterations G^2 L C d), C = G num_new.

Sources: "Some methods for classification and analysis of multivariate observations" (MacQueen, 1967), one row at a
time; the appended and refined window after "Multipole Attention for Efficient Long Context Reasoning" (Hooper et al.,
2025), https://arxiv.org/abs/2506.13059.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.kmeans import cluster_means, nearest, spread_rows


def online_k_means(
    x: Float[Tensor, "b h n d"],
    direction: Float[Tensor, "h d"],
    block_size: int,
    num_new: int,
    iterations: int,
    mask: Bool[Tensor, "b n"] | None,
) -> list[Int[Tensor, "b h _"]]:
    """For every g the clusters of the first (g + 1) `block_size` rows; padding gets the number of clusters, as ever.

    `iterations` counts assignments, as in `k_means`: with 1 a row stays where it was appended. The first entry equals
    `k_means` on the first block. Rows beyond the last whole block are left out.
    """
    x = x.detach()
    real = torch.ones_like(x[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
    centers, alive = x[:, :, :0], real[:, :0]
    cluster = torch.zeros_like(x[:, :, :0, 0], dtype=torch.long)
    versions = []
    for end in range(block_size, x.shape[2] + 1, block_size):
        new, of_new = x[:, :, end - block_size : end], real[:, end - block_size : end]
        seen, of_seen = x[:, :, :end], real[:, :end]
        centers = torch.cat([centers, spread_rows(new, direction, num_new, of_new)], 2)
        # A block of padding alone starts at rows that are no tokens: its centers take part in nothing.
        alive = torch.cat([alive, of_new.any(-1, keepdim=True).expand(-1, num_new)], 1)
        before = torch.where(of_seen[:, None, : end - block_size], cluster, centers.shape[2])
        cluster = torch.cat([before, nearest(new, centers, of_new, alive)], 2)
        centers = cluster_means(seen, cluster, centers)
        for _ in range(iterations - 1):
            cluster = nearest(seen, centers, of_seen, alive)
            centers = cluster_means(seen, cluster, centers)
        versions.append(cluster)
    return versions
