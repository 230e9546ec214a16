"""The best that is possible at a budget: oracles that know P, charged for applying their approximation only.

Low rank: the truncated SVD P_r, applied as U (S V^T V): 2 r (n d_v + m d_v) FLOPs, 4 n r d for square P and d_v = d.
By Eckart-Young P_r is optimal for P in Frobenius norm; its output error ‖(P_r - P) V‖ is a reference curve, which a
method that knows V may beat. For causal P the truncated SVD is a measure only: applying it would read the future.

Sparse: exact top-k of every row, renormalized; 2 d + 2 d_v FLOPs an entry, 4 n k d for d_v = d. Among k-sparse
stochastic rows it has the smallest total variation, which is the mass it drops.

One SVD and one sort serve every budget.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.analysis.error import frobenius, relative_error, total_variation


class Frontier(NamedTuple):
    """Factorizations of one source: P (padded rows zero), its SVD, and the rank of every entry in its row."""

    weights: Float[Tensor, "b h n m"]
    values: Float[Tensor, "b h m x"]
    out: Float[Tensor, "b h n x"]
    left: Float[Tensor, "b h n r"]
    singular: Float[Tensor, "b h r"]
    projected: Float[Tensor, "b h r x"]
    ranks: Int[Tensor, "b h n m"]
    rows: Bool[Tensor, "b n"] | None


def prepare(
    weights: Float[Tensor, "b h n m"], v: Float[Tensor, "b h m x"], rows: Bool[Tensor, "b n"] | None = None
) -> Frontier:
    """Factorize exact weights `weights` once, in float64; `rows` marks real tokens of a padded self-attention."""
    weights, values = weights.double(), v.double()
    if rows is not None:
        real = rows[:, None, :, None]
        weights, values = torch.where(real, weights, 0.0), torch.where(real, values, 0.0)
    left, singular, right = torch.linalg.svd(weights, full_matrices=False)
    ranks = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    projected = singular[..., None] * (right @ values)
    return Frontier(weights, values, weights @ values, left, singular, projected, ranks, rows)


def affordable_rank(flops: float, num_queries: int, num_keys: int, value_dim: int) -> int:
    """Largest r whose application costs at most `flops` a head."""
    return min(int(flops // (2 * value_dim * (num_queries + num_keys))), num_queries, num_keys)


def affordable_k(flops: float, visible: Int[Tensor, " n"], dim: int, value_dim: int) -> int:
    """Largest k at which sum_i min(k, visible_i) entries cost at most `flops` a head."""
    low, high = 0, int(visible.max())
    while low < high:
        k = (low + high + 1) // 2
        affordable = int(visible.clamp_max(k).sum()) * (2 * dim + 2 * value_dim) <= flops
        low, high = (k, high) if affordable else (low, k - 1)
    return low


def rank_r_error(frontier: Frontier, rank: int) -> list[float]:
    """Relative output error of P_r V, a head."""
    out = frontier.left[..., :rank] @ frontier.projected[..., :rank, :]
    return relative_error(out, frontier.out, frontier.rows)


def rank_r_distance(frontier: Frontier, rank: int) -> list[float]:
    """‖P - P_r‖_F a head, over the batch: the root of the squares of the singular values dropped."""
    return frontier.singular[..., rank:].square().sum((0, 2)).sqrt().tolist()


def top_k(frontier: Frontier, k: int) -> Float[Tensor, "b h n m"]:
    """The k largest weights of every row, renormalized; zero for k = 0 and for rows that see nothing."""
    kept = torch.where(frontier.ranks < k, frontier.weights, 0.0)
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)


def top_k_error(frontier: Frontier, k: int) -> list[float]:
    """Relative output error of renormalized top-k, a head."""
    return relative_error(top_k(frontier, k) @ frontier.values, frontier.out, frontier.rows)


def top_k_total_variation(frontier: Frontier, k: int) -> list[float]:
    """Mean over rows of the total variation between renormalized top-k and P, a head."""
    return total_variation(top_k(frontier, k), frontier.weights, frontier.rows)


def top_k_remainder_error(frontier: Frontier, k: int) -> list[float]:
    """Relative output error of top-k with the mass it drops spread evenly over the other visible keys, a head."""
    kept = torch.where(frontier.ranks < k, frontier.weights, 0.0)
    rest = (frontier.weights > 0) & (frontier.ranks >= k)
    dropped = (frontier.weights - kept).sum(-1, keepdim=True)
    weights = kept + torch.where(rest, dropped / rest.sum(-1, keepdim=True).clamp_min(1), 0.0)
    return relative_error(weights @ frontier.values, frontier.out, frontier.rows)


def distance(weights: Float[Tensor, "b h n m"], frontier: Frontier) -> list[float]:
    """‖P~ - P‖_F a head, over the batch."""
    return frobenius(weights.double() - frontier.weights, frontier.rows)
