"""ProbSparse attention: the queries that look least uniform attend exactly, all others get the mean of the values.

The u queries with the largest measure are chosen, estimated from a uniform sample S of u keys:

    M(q_i) = max_{j in S} s_ij - mean_{j in S} s_ij,   s_ij = <q_i, k_j> / sqrt(d),
    out_i = sum_j softmax(s_i)_j v_j for the chosen,   out_i = mean(V) for the others.

Time O(n u d), memory O(n (u + d)). Equals softmax attention when u >= n. With S all keys M is an upper bound of the
divergence KL(uniform || softmax(s_i)) = logsumexp_j s_ij - log n - mean_j s_ij, since logsumexp <= max + log n.

The choice is constant for the gradient, so a query that is not chosen receives none. The choice ranks all queries, so
that a later query could push an earlier one out: not causal. (The published causal form, exact rows for the chosen and
running means for the others, has this leak.)

Source: "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting" (Zhou, Zhang, Peng, Zhang,
Li, Xiong, Zhang, 2020), https://arxiv.org/abs/2012.07436. Departures: a head's queries share one sample, drawn at
construction, where the published code draws one a query anew in every call; u is given, where the paper takes
u = c ln n; the mean in M runs over the sample, where the code divides the sample's sum by n.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import take_rows
from attnlens.linalg.dense import mean_values, softmax_round_off
from attnlens.linalg.partial import partial_attention
from attnlens.linalg.sampling import uniform_sample


def sparsity_measure(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    priority: Int[Tensor, "h m"],
    num_samples: int,
    mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n"]:
    """M(q_i) over the real keys with the smallest priorities; without gradient."""
    sample, log_weight = uniform_sample(priority[None], num_samples, None if mask is None else mask[:, None], k)
    scores = q.detach() @ take_rows(k.detach(), sample).mT * q.shape[-1] ** -0.5
    if mask is None:
        return scores.amax(-1) - scores.mean(-1)
    real = (log_weight > -torch.inf)[:, :, None]
    count = real.sum(-1).clamp_min(1)
    return scores.masked_fill(~real, -torch.inf).amax(-1) - scores.masked_fill(~real, 0).sum(-1) / count


def prob_sparse_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    priority: Int[Tensor, "h n"],
    num_queries: int,
    *,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Exact rows for `num_queries` queries, the mean of the real values for the others."""
    n = q.shape[2]
    if num_queries >= n:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)[0]
    measure = sparsity_measure(q, k, priority, num_queries, key_padding_mask)
    if key_padding_mask is not None:
        measure = measure.masked_fill(~key_padding_mask[:, None], -torch.inf)
    chosen = measure.topk(num_queries, dim=-1).indices
    exact = partial_attention(take_rows(q, chosen), k, v, key_padding_mask=key_padding_mask)[0]
    mean = mean_values(v, causal=False, key_padding_mask=key_padding_mask).expand(-1, -1, n, -1)
    return mean.scatter(2, chosen[..., None].expand(-1, -1, -1, v.shape[-1]), exact)


class Informer(AbstractAttention):
    """ProbSparse attention.

    Args:
        num_queries: queries that attend exactly, and keys sampled to find them, at least 1.
        num_heads: each draws its own sample.
        max_length: the longest input.
        seed: of the sample.
    """

    family = "sparse"
    budget = "num_queries"
    causal = False
    self_attention = True
    row_stochastic = True
    rows_independent = False

    def __init__(self, num_queries: int, num_heads: int, max_length: int, seed: int) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"`num_queries` must be at least 1, got {num_queries}")
        self.num_queries = num_queries
        generator = torch.Generator().manual_seed(seed)
        self.priority: Tensor
        # Integers, which keep their order when the module is cast to half precision.
        order = torch.rand(num_heads, max_length, generator=generator, device="cpu").argsort(-1)
        self.register_buffer("priority", order)

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every query chosen."""
        return {"num_queries": length}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """min(tanh(w_i / 4), sqrt(M_i / 2)) times the diameter of the values, w_i the range of the scores: analysis.

        It holds for every row, chosen or not. A row that is not chosen has uniform weights, whose total variation from
        P_i is at most sqrt(KL(uniform || P_i) / 2) (Pinsker) <= sqrt(M_i / 2) with M_i over all keys, and at most
        tanh(w_i / 4), since the ratio of the two lies in some [a, a e^{w_i}] and has mean 1. Moving mass t among values
        moves their mean by t times their diameter at most. Round-off is added.
        """
        real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        rows, keys, values = (torch.where(real[:, None, :, None], x, 0).double() for x in (q, k, v))
        scores, hidden = rows @ keys.mT * q.shape[-1] ** -0.5, ~real[:, None, None]
        top = scores.masked_fill(hidden, -torch.inf).amax(-1)
        width = top - scores.masked_fill(hidden, torch.inf).amin(-1)
        count = real.sum(-1).clamp_min(1)[:, None, None]
        divergence = top - scores.masked_fill(hidden, 0).sum(-1) / count
        pairs = real[:, None, :, None] & real[:, None, None, :]
        diameter = torch.cdist(values, values).masked_fill(~pairs, 0).amax((-2, -1))[..., None]
        moved = torch.minimum(torch.tanh(width.clamp_min(0) / 4), (divergence.clamp_min(0) / 2).sqrt())
        return (moved * diameter + softmax_round_off(q, keys.to(q.dtype), values.to(q.dtype))).to(q.dtype)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        n = q.shape[2]
        if n > self.priority.shape[1]:
            raise ValueError(f"length {n} is beyond `max_length`={self.priority.shape[1]}: build with a larger one")
        draws = self.priority[:, :n], self.num_queries
        return prob_sparse_attention(q, k, v, *draws, key_padding_mask=key_padding_mask)
