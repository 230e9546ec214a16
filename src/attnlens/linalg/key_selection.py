"""Choosing a few keys that stand for all, from the keys alone.

- `KMeans`: of every cluster the key nearest to its mean.
- `KMedian`: of every cluster the key nearest to its coordinatewise median, in the l1 norm.
- `Leverage`: the keys with the largest leverage scores.

Exactly min(size, real keys) different keys are chosen. Where clusters are empty, the second nearest keys of the others
fill up, then the third, in the order of positions. A choice has no gradient and does not depend on padding.

Source: "Efficient Attention via Pre-Scoring: Prioritizing Informative Keys in Transformers" (Li, Wang, Bao, Woodruff,
2025), https://arxiv.org/abs/2505.11040.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlens.linalg.blocks import inverse, real_first, take_rows
from attnlens.linalg.kmeans import k_means
from attnlens.linalg.kmedian import k_medians
from attnlens.linalg.leverage import leverage_scores


class AbstractKeySelection(nn.Module, ABC):
    """A rule that orders keys by what they are worth to the others."""

    @abstractmethod
    def order(self, k: Float[Tensor, "b h m d"], size: int, mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, "b h m"]:
        """All keys, of which the first `size` are chosen; padding, which is zero, comes last."""

    @torch.no_grad()
    def forward(self, k: Float[Tensor, "b h m d"], size: int, mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, "b h s"]:
        """min(size, m) keys, in the order of positions; real ones first."""
        chosen = self.order(k.detach(), size, mask)[..., :size]
        if mask is None:
            return chosen.sort(dim=-1).values
        real = mask[:, None].expand(*chosen.shape[:2], -1).gather(-1, chosen)
        return chosen.gather(-1, torch.where(real, chosen, mask.shape[1]).argsort(dim=-1, stable=True))


def steps(x: Float[Tensor, "*k"]) -> Float[Tensor, "*k"]:
    """x >= 0 on a logarithmic scale of steps of a thousandth, so that round-off does not choose between equal ones."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).log().mul(1000).round()


class Leverage(AbstractKeySelection):
    """The keys with the largest leverage scores; of equal ones, to about a thousandth, the first.

    Equal keys have equal scores, and where tokens repeat and are linearly independent, a score is one over the number
    of its repetitions: round-off, which depends on the shapes, must not choose among them.
    """

    def order(self, k: Float[Tensor, "b h m d"], size: int, mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, "b h m"]:
        return real_first(-steps(leverage_scores(k)), mask)


def nearest_members(
    distance: Float[Tensor, "b h m"], cluster: Int[Tensor, "b h m"], mask: Bool[Tensor, "b m"] | None
) -> Int[Tensor, "b h m"]:
    """Keys in the order of their rank within their cluster by distance to its center, ties by position.

    The two keys of a cluster of two are equally far from its mean, and round-off, which differs from device to device,
    must not choose: distances of one step count as equal.
    """
    order = steps(distance).argsort(dim=-1, stable=True)
    label = cluster.gather(-1, order)
    by_cluster = order.gather(-1, label.argsort(dim=-1, stable=True))
    ordered = cluster.gather(-1, by_cluster)
    place = torch.arange(cluster.shape[-1], device=cluster.device)
    rank = place - torch.searchsorted(ordered, ordered)
    return real_first(rank.gather(-1, inverse(by_cluster)), mask)


class _Clusters(AbstractKeySelection, ABC):
    """What the two clusterings share: the direction in whose order they start, and their iterations."""

    def __init__(self, head_dim: int, num_heads: int, seed: int, iterations: int = 3) -> None:
        super().__init__()
        if iterations < 1:
            raise ValueError(f"`iterations` must be at least 1, got {iterations}")
        self.iterations = iterations
        generator = torch.Generator().manual_seed(seed)
        self.direction: Tensor
        self.register_buffer("direction", torch.randn(num_heads, head_dim, generator=generator, device="cpu"))


class KMeans(_Clusters):
    """The key nearest to the mean of its cluster, for as many clusters as keys are wanted.

    Args:
        head_dim: of the keys.
        num_heads: each starts in the order of its own direction.
        seed: of the directions.
        iterations: assignments, at least 1.
    """

    def order(self, k: Float[Tensor, "b h m d"], size: int, mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, "b h m"]:
        cluster, centers = k_means(k, self.direction, size, self.iterations, mask)
        # Padding has no cluster; it goes with the last one and is sorted out in the end.
        own = take_rows(centers, cluster.clamp_max(size - 1))
        return nearest_members((k - own).square().sum(-1), cluster, mask)


class KMedian(_Clusters):
    """The key nearest to the median of its cluster, in the l1 norm, for as many clusters as keys are wanted.

    Args:
        head_dim: of the keys.
        num_heads: each starts in the order of its own direction.
        seed: of the directions.
        iterations: assignments, at least 1.
    """

    def order(self, k: Float[Tensor, "b h m d"], size: int, mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, "b h m"]:
        cluster, centers = k_medians(k, self.direction, size, self.iterations, mask)
        own = take_rows(centers, cluster.clamp_max(size - 1))
        return nearest_members((k - own).abs().sum(-1), cluster, mask)
