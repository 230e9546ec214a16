"""Clusters of the keys of each window of positions: of all windows at once, or of the past of every block.

Windows are clustered apart from each other, in the batch axis. Causal, a window fills up in blocks (`online_k_means`)
and is frozen when full: block t sees the finished windows and its own window as it is after block t - 1, which depend
on the blocks before t alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.band import to_blocks
from attnlens.linalg.clusters import Clusters, Levels, clusters_of_clusters, clusters_of_keys
from attnlens.linalg.kmeans import k_means
from attnlens.linalg.online_kmeans import online_k_means


class Clustering(NamedTuple):
    """How keys are clustered; `block_size` divides `window`, the number of blocks divides `num_clusters`.

    num_clusters, num_coarse: of a window; without `num_coarse` there is one level.
    iterations: of k-means.
    first_order: whether clusters of keys have moments.
    """

    num_clusters: int
    window: int
    block_size: int
    iterations: int
    first_order: bool
    num_coarse: int | None

    @property
    def blocks(self) -> int:
        """Blocks of a window."""
        return self.window // self.block_size


def all_windows(
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    direction: Float[Tensor, "h d"],
    how: Clustering,
    mask: Bool[Tensor, "b m"] | None,
) -> Levels:
    """Clusters of every window, side by side."""
    keys, values, real = _folded(k, v, mask, min(how.window, k.shape[2]))
    cluster, _ = k_means(keys, direction, how.num_clusters, how.iterations, real)
    fine, coarse = _levels(keys, values, cluster, direction, how, how.blocks)
    batch = k.shape[0]
    return Levels(fine.of_windows(batch), None if coarse is None else coarse.of_windows(batch))


def past_windows(
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    direction: Float[Tensor, "h d"],
    how: Clustering,
    mask: Bool[Tensor, "b n"] | None,
) -> Iterator[Levels]:
    """For the second block and every later one, clusters of the blocks before it."""
    batch, size, blocks = k.shape[0], how.block_size, how.blocks
    whole = (k.shape[2] - 1) // size
    if whole == 0:
        return
    past = slice(0, whole * size)
    keys, values, real = _folded(k[:, :, past], v[:, :, past], None if mask is None else mask[:, past], how.window)
    # A first window that is not full needs no version beyond its last block.
    last = min(blocks, whole) * size
    keys, values, real = keys[:, :, :last], values[:, :, :last], None if real is None else real[:, :last]
    versions = [
        _levels(keys[:, :, : cluster.shape[2]], values[:, :, : cluster.shape[2]], cluster, direction, how, g)
        for g, cluster in enumerate(
            online_k_means(keys, direction, size, how.num_clusters // blocks, how.iterations, real), start=1
        )
    ]
    full = versions[-1]
    fine, coarse = full.fine.of_windows(batch), None if full.coarse is None else full.coarse.of_windows(batch)
    for t in range(1, whole + 1):
        window, g = divmod(t, blocks)
        now = versions[g - 1] if g else None
        of_keys = _joined(fine, now and now.fine, batch, window, how.num_clusters, how.window)
        if coarse is None or how.num_coarse is None:
            yield Levels(of_keys, None)
        else:
            yield Levels(of_keys, _joined(coarse, now and now.coarse, batch, window, how.num_coarse, how.num_clusters))


def _joined(
    finished: Clusters, now: Clusters | None, batch: int, window: int, num_clusters: int, members: int
) -> Clusters:
    """The first `window` windows, of so many clusters and members each, and the next one as it is now."""
    past = finished.first(window * num_clusters, window * members)
    return past if now is None else past.joined(now.of_window(batch, window, members))


def _levels(
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    cluster: Int[Tensor, "b h m"],
    direction: Float[Tensor, "h d"],
    how: Clustering,
    blocks: int,
) -> Levels:
    """Both levels of windows of which so many blocks are there."""
    num_clusters = how.num_clusters * blocks // how.blocks
    fine = clusters_of_keys(k, v, cluster, num_clusters, first_order=how.first_order)
    if how.num_coarse is None:
        return Levels(fine, None)
    num_coarse = -(-how.num_coarse * blocks // how.blocks)
    return Levels(fine, clusters_of_clusters(fine, direction, num_coarse, how.iterations))


def _folded(
    k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m dv"], mask: Bool[Tensor, "b m"] | None, size: int
) -> tuple[Float[Tensor, "w h s d"], Float[Tensor, "w h s dv"], Bool[Tensor, "w s"] | None]:
    """Windows in the batch axis, the last filled up with padding."""
    keys, values = (to_blocks(x, size).flatten(0, 1) for x in (k, v))
    if mask is None and k.shape[2] % size == 0:
        return keys, values, None
    real = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
    return keys, values, F.pad(real, (0, -k.shape[2] % size)).reshape(-1, size)
