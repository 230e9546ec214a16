"""Clustered attention: one row of weights for a cluster of queries, exact for each query on the cluster's top keys.

Queries are put into C clusters by k-means; centroid c has the row A^c = softmax(s K q^c). With T_c the k keys of the
largest weights in it, m_c = sum_{j in T_c} A^c_j their mass, and c = c(i) the cluster of query i,

    out_i = m_c sum_{j in T_c} e^{s <q_i, k_j>} v_j / sum_{j in T_c} e^{s <q_i, k_j>} + sum_{j not in T_c} A^c_j v_j:

the k keys share their mass as query i itself would, all others weigh what they weigh for the centroid. Time
O(n C d (iterations + 2) + n k d), memory O(C n + n d). Equals softmax attention when k >= n.

The row P~_i is no farther from P_i than A^c is, in l1: on T_c, |m_c P_i / P_i(T_c) - P_i|_1 = |m_c - P_i(T_c)|, which
is at most |A^c - P_i|_1 there, and elsewhere both are A^c. Clusters and top keys are constants for the gradient,
centroids are not. Clusters read all queries, so it is not causal.

Source: "Fast Transformers with Clustered Attention" (Vyas, Katharopoulos, Fleuret, 2020),
https://arxiv.org/abs/2007.04825, the improved form. Departure: k-means in the space of the queries, where the paper
clusters 63 sign bits in Hamming space: what enters the error is |q_i - q^c|. It starts at the queries that stand at the
midpoints of C equal parts in the order of a random projection; tokens at even distances in the sequence would all start
in one cluster where the sequence has a period.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import take_rows, tiles
from attnlens.linalg.dense import softmax_round_off, softmax_weights
from attnlens.linalg.kmeans import k_means
from attnlens.linalg.partial import partial_attention


def clustered_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    direction: Float[Tensor, "h d"],
    num_clusters: int,
    top_k: int,
    iterations: int,
    *,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Every query over its cluster's `top_k` keys with its own weights, over the others with the cluster's."""
    n = q.shape[2]
    if top_k >= n:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)[0]
    cluster, centers = k_means(q, direction, num_clusters, iterations, key_padding_mask)
    weights = softmax_weights(centers, k, key_padding_mask=key_padding_mask)
    top = weights.detach().topk(top_k, dim=-1).indices
    mass = weights.gather(-1, top).sum(-1)
    rest = weights.scatter(-1, top, 0) @ v
    # Padding, which has no cluster, goes with the last one: its rows are not read.
    cluster = cluster.clamp_max(centers.shape[2] - 1)
    near = _top_keys(q, k, v, top, cluster, key_padding_mask)
    return mass.gather(-1, cluster)[..., None] * near + take_rows(rest, cluster)


def _top_keys(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    top: Int[Tensor, "b h c t"],
    cluster: Int[Tensor, "b h n"],
    mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Softmax attention of every query over the keys of its cluster, in tiles of queries of one cluster."""
    b, h, n, _ = q.shape
    c = top.shape[2]
    cut = tiles(cluster, c, max(1, n // (2 * c)))
    chosen = top.gather(2, cut.block[..., None].expand(-1, -1, -1, top.shape[-1]))
    bias = None
    if mask is not None:
        hidden = ~mask[:, None].expand(-1, h, -1).gather(-1, chosen.flatten(2)).view(chosen.shape)
        bias = torch.zeros(chosen.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -torch.inf)
        bias = bias.flatten(1, 2)[:, :, None]
    rows, keys, values = (take_rows(x, at).flatten(1, 2) for x, at in ((q, cut.members), (k, chosen), (v, chosen)))
    out = partial_attention(rows, keys, values, bias=bias)[0]
    return take_rows(out.reshape(b, h, -1, v.shape[-1]), cut.place)


class Clustered(AbstractAttention):
    """Improved clustered attention.

    Args:
        top_k: keys on which every query has its own weights, at least 1.
        num_clusters: clusters of queries, at least 1; with as many as tokens, every query is a cluster.
        iterations: of k-means, at least 1.
        head_dim: of queries and keys.
        num_heads: each has its own direction of the start.
        seed: of the directions.
    """

    family = "clustering"
    budget = "top_k"
    causal = False
    self_attention = True
    row_stochastic = True
    rows_independent = False

    def __init__(
        self, top_k: int, num_clusters: int, head_dim: int, num_heads: int, seed: int, iterations: int = 3
    ) -> None:
        super().__init__()
        for name, value in (("top_k", top_k), ("num_clusters", num_clusters), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.top_k, self.num_clusters, self.iterations = top_k, num_clusters, iterations
        generator = torch.Generator().manual_seed(seed)
        self.direction: Tensor
        self.register_buffer("direction", torch.randn(num_heads, head_dim, generator=generator, device="cpu"))

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every key recomputed for every query."""
        return {"top_k": length}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """tanh(w_i / 4) times the diameter of the values, w_i the range over j of s <q_i - q^c, k_j>: analysis.

        P~_i and P_i are within |A^c - P_i|_1 / 2 of each other in total variation (above), which is at most
        tanh(w_i / 4): the ratio r = P_ij / A^c_j has mean 1 under A^c and lies in some [a, a e^w], so that, |r - 1|
        being convex, its mean is largest when r takes the two ends only, and over a that is 2 tanh(w / 4). Moving mass
        t among values moves their mean by t times their diameter at most. Round-off is added.
        """
        real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        keys, values = (torch.where(real[:, None, :, None], x, 0).double() for x in (k, v))
        rows = torch.where(real[:, None, :, None], q, 0)
        cluster, centers = k_means(rows, self.direction, self.num_clusters, self.iterations, key_padding_mask)
        center = take_rows(centers, cluster.clamp_max(centers.shape[2] - 1)).double()
        shift = (rows.double() - center) @ keys.mT * q.shape[-1] ** -0.5
        hidden = ~real[:, None, None]
        width = shift.masked_fill(hidden, -torch.inf).amax(-1) - shift.masked_fill(hidden, torch.inf).amin(-1)
        pairs = real[:, None, :, None] & real[:, None, None, :]
        diameter = torch.cdist(values, values).masked_fill(~pairs, 0).amax((-2, -1))[..., None]
        bound = torch.tanh(width.clamp_min(0) / 4) * diameter
        return (bound + softmax_round_off(rows, keys.to(q.dtype), values.to(q.dtype))).to(q.dtype)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        sizes = self.num_clusters, self.top_k, self.iterations
        return clustered_attention(q, k, v, self.direction, *sizes, key_padding_mask=key_padding_mask)
