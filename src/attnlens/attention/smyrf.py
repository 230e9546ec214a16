"""SMYRF: exact attention inside balanced groups of queries and keys that hash near each other, over several rounds.

With q scaled by 1/sqrt(d) and M^2 = max_i |q_i|^2 + max_j |k_j|^2 over the real tokens,

    phi(q) = [q; 0; sqrt(M^2 - |q|^2)],   psi(k) = [k; sqrt(M^2 - |k|^2); 0],   |phi(q) - psi(k)|^2 = 2 (M^2 - <q, k>),

so that a near pair is a pair with a large logit. Round r projects both on a random direction w_r, sorts queries and
keys separately and cuts each into L groups of equal size. Query group g attends to key group g, and rounds are merged
by their log-sum-exp:

    out_i = sum_j c_ij exp(<q_i, k_j>) v_j / sum_j c_ij exp(<q_i, k_j>),   c_ij = number of rounds that group i with j.

Time O(R n (group_size d + log n)), memory O(R n d). Equals softmax attention with one group (group_size >= n), at any
number of rounds; more rounds do not lead there, since c_ij tends to a collision probability, not to a constant.

Groups depend on hard assignments: they are constants for the gradient. The sort reads all tokens, so it is not causal.

Source: "SMYRF: Efficient Attention using Asymmetric Clustering" (Daras, Kitaev, Odena, Dimakis, 2020),
https://arxiv.org/abs/2010.05315. Departures: logits carry 1/sqrt(d); L = ceil(n / group_size) need not divide n, sizes
then differ by one; padding belongs to no group. The survey's text has squared norms for M and a round weight without
its logarithm; both are slips.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import Groups, balanced_groups, take_rows
from attnlens.linalg.partial import merge, partial_attention


def asymmetric_projections(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], directions: Float[Tensor, "h r d+2"]
) -> tuple[Float[Tensor, "b h r n"], Float[Tensor, "b h r m"]]:
    """<phi(q), w_r> and <psi(k), w_r> for every direction; without gradient."""
    q, k, w = q.detach() * q.shape[-1] ** -0.5, k.detach(), directions.to(q.dtype)
    q_squared, k_squared = q.square().sum(-1), k.square().sum(-1)
    top = q_squared.amax(-1, keepdim=True) + k_squared.amax(-1, keepdim=True)
    plain, for_keys, for_queries = w[..., :-2], w[..., -2, None], w[..., -1, None]
    q_lift = (top - q_squared).clamp_min(0).sqrt()[:, :, None]
    k_lift = (top - k_squared).clamp_min(0).sqrt()[:, :, None]
    return plain @ q.mT + for_queries * q_lift, plain @ k.mT + for_keys * k_lift


def grouped_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    q_groups: Groups,
    k_groups: Groups,
) -> tuple[Float[Tensor, "b h r n dv"], Float[Tensor, "b h r n"]]:
    """`(out, lse)` of every round, each query over the key group of its own group's number."""
    b, h, r, groups, slots = k_groups.members.shape
    bias = None
    if k_groups.filled is not None:
        bias = torch.zeros(k_groups.filled.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~k_groups.filled, -torch.inf).flatten(1, 3)[:, :, None]
    rows, keys, values = (
        take_rows(x, members).flatten(1, 3)
        for x, members in ((q, q_groups.members), (k, k_groups.members), (v, k_groups.members))
    )
    out, lse = partial_attention(rows, keys, values, bias=bias)
    # All rounds of a head become one run of slots, in which round t starts at t * groups * slots.
    start = torch.arange(r, device=q.device)[:, None] * (groups * slots)
    place = q_groups.place + start
    out = take_rows(out.reshape(b, h, -1, v.shape[-1]), place)
    return out, lse.reshape(b, h, -1).gather(-1, place.flatten(2)).view(place.shape)


def smyrf_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    directions: Float[Tensor, "h r d+2"],
    group_size: int,
    *,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Attention within balanced groups, one round for each of a head's directions; padded queries give zero."""
    if group_size >= k.shape[2]:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)[0]
    of_queries, of_keys = asymmetric_projections(q, k, directions)
    q_groups = balanced_groups(of_queries, group_size, key_padding_mask)
    k_groups = balanced_groups(of_keys, group_size, key_padding_mask)
    outs, lses = grouped_attention(q, k, v, q_groups, k_groups)
    out = merge(*((outs[:, :, t], lses[:, :, t]) for t in range(directions.shape[1])))[0]
    return out if key_padding_mask is None else torch.where(key_padding_mask[:, None, :, None], out, 0)


class Smyrf(AbstractAttention):
    """Attention in balanced groups by asymmetric locality-sensitive hashing.

    Args:
        group_size: most keys of a group, at least 1; a query sees at most `num_rounds` times as many.
        num_rounds: rounds of hashing, at least 1.
        head_dim: of queries and keys.
        num_heads: each draws its own directions.
        seed: of the directions.
    """

    family = "clustering"
    budget = "group_size"
    causal = False
    self_attention = True
    row_stochastic = True
    rows_independent = False

    def __init__(self, group_size: int, num_rounds: int, head_dim: int, num_heads: int, seed: int) -> None:
        super().__init__()
        if group_size < 1:
            raise ValueError(f"`group_size` must be at least 1, got {group_size}")
        if num_rounds < 1:
            raise ValueError(f"`num_rounds` must be at least 1, got {num_rounds}")
        self.group_size = group_size
        generator = torch.Generator().manual_seed(seed)
        self.directions: Tensor
        draw = torch.randn(num_heads, num_rounds, head_dim + 2, generator=generator, device="cpu")
        self.register_buffer("directions", draw)

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With one group."""
        return {"group_size": length}

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return smyrf_attention(q, k, v, self.directions, self.group_size, key_padding_mask=key_padding_mask)
