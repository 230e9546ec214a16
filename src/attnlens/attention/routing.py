"""Routing attention: a query attends to the latest keys that have the same nearest centroid, and to its own.

Queries and keys, layer-normalized without weights, go to the nearest of C centroids mu of their head. The keys of
a cluster, in the order of their positions, are cut into chunks of w by rank. With c_i the chunk of the latest key
of its cluster at or before position i, query i sees that chunk and the one before it:

    P_i = {i} and {j : cluster(k_j) = cluster(q_i), c_i - floor(rank(j) / w) in {0, 1}}   (and j <= i causal),
    out_i = sum_{j in P_i} e^{s <q_i, k_j>} v_j / sum_{j in P_i} e^{s <q_i, k_j>}.

Time O(n (C d + w d + log n)), memory O(n d) and that of the tiles, n + (n / w + C) min(w, 64) rows. Equals softmax
attention with one centroid and w >= n.

Membership and ranks depend on the token and its past, so the causal form leaks nothing, and no row is empty. Clusters
are constants for the gradient: centroids are buffers, learned in training mode, where `decay` is below 1, by

    mu_c <- decay mu_c + (1 - decay) mean of the queries and keys of cluster c, over the whole batch,

after the output is computed, and frozen in evaluation mode. With decay 1 they stay as drawn.

Source: "Efficient Content-Based Sparse Attention with Routing Transformers" (Roy, Saffar, Vaswani, Grangier, 2020),
https://arxiv.org/abs/2003.05997. Departures: there each centroid takes the w tokens nearest to it, which depends on
later tokens and leaves the tokens that none takes without output; here each token takes its nearest centroid. The
paper's update adds the sum of the members, which grows with the batch; here it is their mean.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import inverse, scores_at_once, tiles
from attnlens.linalg.dense import softmax_round_off, softmax_weights
from attnlens.linalg.hashing import first_largest
from attnlens.linalg.ranges import Ranges, range_attention


def nearest_centroid(x: Float[Tensor, "b h n d"], centroids: Float[Tensor, "h c d"]) -> Int[Tensor, "b h n"]:
    """The centroid nearest to the layer-normalized row; without gradient."""
    centroids = centroids.to(x.dtype)
    half = centroids.square().sum(-1)[:, None] / 2
    rows_at_once = max(1, scores_at_once(x) // 8 // (x.shape[0] * x.shape[1] * max(centroids.shape[1:])))
    parts = x.detach().split(rows_at_once, 2)
    return torch.cat([first_largest(F.layer_norm(part, x.shape[-1:]) @ centroids.mT - half) for part in parts], 2)


def key_order(
    of_keys: Int[Tensor, "b h n"], of_queries: Int[Tensor, "b h n"], num_clusters: int
) -> tuple[Int[Tensor, "b h n"], Int[Tensor, "b h c"], Int[Tensor, "b h n"]]:
    """Keys in the order of (cluster, position), where each cluster starts in it, and how many keys of its cluster a
    query has at or before its position."""
    n, device = of_keys.shape[-1], of_keys.device
    position = torch.arange(n, device=device)
    ordered, order = (of_keys * n + position).sort(dim=-1)
    first = torch.arange(num_clusters + 1, device=device).expand(*of_keys.shape[:2], -1) * n
    start = torch.searchsorted(ordered, first.contiguous())
    past = torch.searchsorted(ordered, of_queries * n + position, right=True) - start.gather(-1, of_queries)
    return order, start, past


def latest_chunk(past: Int[Tensor, "*k"], chunk_size: int) -> Int[Tensor, "*k"]:
    """c_i from the number of keys so far; 0 where there is none."""
    return (past - 1).clamp_min(0) // chunk_size


def key_ranges(
    start: Int[Tensor, "b h c"],
    past: Int[Tensor, "b h n"],
    of_queries: Int[Tensor, "b h n"],
    chunk_size: int,
    causal: bool,
) -> Ranges:
    """Queries of one cluster and chunk in tiles of 64 at most, and the places of the keys that they see: P_i without
    the own key where that is in another cluster."""
    n, begin, end = of_queries.shape[-1], start.gather(-1, of_queries), start.gather(-1, of_queries + 1)
    size, chunk = min(chunk_size, n), latest_chunk(past, chunk_size)
    # It grows by one from chunk to chunk of a cluster, and from one cluster to the next by one at least.
    number = (begin + chunk * chunk_size) // size + of_queries
    rows = min(size, 64)
    cut = tiles(number, n // size + start.shape[-1] - 1, rows)
    low = begin + (chunk - 1).clamp_min(0) * chunk_size
    high = torch.minimum(begin + (chunk + 1) * chunk_size, end)
    head = cut.members[..., 0]
    low, width = low.gather(-1, head), (high - low).gather(-1, head)
    room = width[..., None]
    if causal:
        room = (begin + past).gather(-1, cut.members.flatten(-2)).view(cut.members.shape) - low[..., None]
    used = cut.place.amax(-1, keepdim=True) // rows
    unused = torch.arange(width.shape[-1], device=width.device) > used
    return Ranges(cut.members, cut.place, low, width.masked_fill(unused, -1), room)


def with_own_key(
    part: tuple[Float[Tensor, "g n dv"], Float[Tensor, "g n"]],
    q: Float[Tensor, "g n d"],
    k: Float[Tensor, "g n d"],
    v: Float[Tensor, "g n dv"],
    missing: Bool[Tensor, "g n"],
) -> Float[Tensor, "g n dv"]:
    """The attention of `part` and of every query to the key at its own position, where that is missing in `part`."""
    out, lse = part
    score = torch.where(missing, (q * k).sum(-1) * q.shape[-1] ** -0.5, -torch.inf)
    return torch.lerp(out, v, torch.sigmoid(score - lse)[..., None])


def routed_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    of_queries: Int[Tensor, "b h n"],
    of_keys: Int[Tensor, "b h n"],
    num_clusters: int,
    chunk_size: int,
    *,
    causal: bool,
) -> Float[Tensor, "b h n dv"]:
    """Softmax over P_i; keys of a cluster beyond the last (padding) are seen by none but their own queries."""
    order, start, past = key_order(of_keys, of_queries, num_clusters)
    ranges = key_ranges(start, past, of_queries, chunk_size, causal)
    n = q.shape[2]
    widest = min(2 * chunk_size, n)
    at_once = max(1, scores_at_once(q) // (n * widest))
    # A key in the cluster of its query is the latest of it at that position: it is in the query's chunk.
    tensors = (q, k, v, of_queries != of_keys, order, *ranges)
    outs = []
    for rows, keys, values, missing, places, *cut in zip(
        *(x.flatten(0, 1).split(at_once) for x in tensors), strict=True
    ):
        part = range_attention(rows, keys, values, places, Ranges(*cut), widest)
        outs.append(with_own_key(part, rows, keys, values, missing))
    return torch.cat(outs).view_as(v)


class Routing(AbstractAttention):
    """Attention within clusters of a head's own centroids.

    Args:
        chunk_size: keys of a chunk, at least 1; a query sees at most twice as many and its own.
        num_clusters: centroids a head, at least 1.
        head_dim: of queries and keys.
        num_heads: each has its own centroids.
        seed: of the first centroids.
        decay: of the centroids' moving average, above 0 and at most 1; 1 keeps them as they are.
    """

    family = "clustering"
    budget = "chunk_size"
    self_attention = True
    row_stochastic = True

    def __init__(
        self, chunk_size: int, num_clusters: int, head_dim: int, num_heads: int, seed: int, decay: float = 1.0
    ) -> None:
        super().__init__()
        for name, value in (("chunk_size", chunk_size), ("num_clusters", num_clusters)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if not 0 < decay <= 1:
            raise ValueError(f"`decay` must be above 0 and at most 1, got {decay}; the paper takes 0.999")
        self.chunk_size, self.num_clusters, self.decay = chunk_size, num_clusters, decay
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(num_heads, num_clusters, head_dim, generator=generator, device="cpu")
        self.centroids: Tensor
        self.register_buffer("centroids", F.layer_norm(draw, (head_dim,)))

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With one centroid and one chunk."""
        return {"chunk_size": length, "num_clusters": 1}

    def clusters(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Int[Tensor, "b h n"], Int[Tensor, "b h n"]]:
        """The clusters of queries and keys; padded keys go to one beyond the last."""
        of_queries, of_keys = (nearest_centroid(x, self.centroids) for x in (q, k))
        return of_queries, of_keys if mask is None else torch.where(mask[:, None], of_keys, self.num_clusters)

    def visible(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"] | None, causal: bool
    ) -> Bool[Tensor, "b h n n"]:
        """The pairs of P_i, materialized: analysis, not the fast path."""
        of_queries, of_keys = self.clusters(q, k, mask)
        order, start, past = key_order(of_keys, of_queries, self.num_clusters)
        chunk = latest_chunk(past, self.chunk_size)
        rank = inverse(order) - start.gather(-1, of_keys)
        step = chunk[..., None] - (rank // self.chunk_size)[..., None, :]
        seen = (of_queries[..., None] == of_keys[..., None, :]) & (step >= 0) & (step <= 1)
        seen = seen | torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        return seen.tril() if causal else seen

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """The softmax mass outside P_i times the diameter of the values, from the dense matrix: analysis.

        With delta_i that mass, softmax attention is (1 - delta_i) a + delta_i b for two means of values, a over P_i,
        which the operator returns, and b over the rest: the error is delta_i |b - a|. Round-off is added.
        """
        real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        rows, keys, values = (torch.where(real[:, None, :, None], x, 0) for x in (q, k, v))
        weights = softmax_weights(rows.double(), keys.double(), causal=causal, key_padding_mask=key_padding_mask)
        dropped = weights.masked_fill(self.visible(rows, keys, key_padding_mask, causal), 0).sum(-1)
        pairs = real[:, None, :, None] & real[:, None, None, :]
        apart = torch.cdist(values.double(), values.double()).masked_fill(~pairs, 0).amax((-2, -1))[..., None]
        return (dropped * apart + softmax_round_off(rows, keys, values)).to(q.dtype)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        of_queries, of_keys = self.clusters(q, k, key_padding_mask)
        out = routed_attention(q, k, v, of_queries, of_keys, self.num_clusters, self.chunk_size, causal=causal)
        if self.training and self.decay < 1:
            if key_padding_mask is not None:
                of_queries = torch.where(key_padding_mask[:, None], of_queries, self.num_clusters)
            self._learn(torch.cat([q, k], 2), torch.cat([of_queries, of_keys], 2))
        return out

    @torch.no_grad()
    def _learn(self, x: Float[Tensor, "b h n d"], cluster: Int[Tensor, "b h n"]) -> None:
        member = F.one_hot(cluster, self.num_clusters + 1)[..., :-1].to(x.dtype)
        count = member.sum((0, 2))[..., None]
        mean = (member.mT @ F.layer_norm(x, x.shape[-1:])).sum(0) / count.clamp_min(1)
        moved = self.decay * self.centroids + (1 - self.decay) * mean
        self.centroids.copy_(torch.where(count > 0, moved, self.centroids))
