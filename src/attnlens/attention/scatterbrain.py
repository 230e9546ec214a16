"""Scatterbrain: hashed blocks exactly, all other pairs from positive random features.

With x = d^{-1/4} q, y = d^{-1/4} k, features phi of `performer` and a support of pairs (i, j) that does not look at
them, the estimate of e^{s <q_i, k_j>} is exact on the support and <phi(x_i), phi(y_j)> elsewhere:

    out_i = sum_j A~_ij v_j / sum_j A~_ij,   A~ = phi(X) phi(Y)^T + S,   S_ij = e^{<x_i, y_j>} - <phi(x_i), phi(y_j)>

on the support, zero elsewhere. A~ is unbiased; an entry's variance over features and supports is that of the features,
e^{2 <x, y>} (e^{|x + y|^2} - 1) / m for independent ones, times the probability that the pair is outside the support.

The support: keys sorted by their hyperplane code are cut into blocks of b, and a query is paired with the block in
whose interval of codes its own code falls. Bidirectional, blocks are those of all keys; causal, a row is paired with
the past of its leaf of 4 b positions and with one block of every wholly past cell (`linalg.hashed_blocks`).

The sum phi(X) phi(Y)^T V + S V has positive terms that cancel on the support; with positive features what is left of
them is the sum over pairs outside, and that is what is computed, from the feature sums of all blocks but one:

    out_i = softmax over (keys j in B_i: <x_i, y_j>;  features f: <w_f, x_i> - |x_i|^2/2 - log m + l_f) of (v_j; o_f),
    (o_f, l_f) = attention of feature w_f over the keys outside B_i, with logits <w_f, y_j> - |y_j|^2/2.

So A~ >= 0, rows sum to one to round-off, and row sums cannot vanish, whereas the signed form can lose them to round-off
(`nonpositive_rows` counts where). Sums over all blocks but one are merged from prefixes and suffixes by
log-sum-exp, in log(n / b) steps: nothing is subtracted.

Time O(n (m + b) (d + dv) + (n / b) m dv log(n / b)), memory O(n (d + dv) + (n / b) m dv); causal, times log(n / b).
Equals softmax attention when b >= n. Support by equality of codes, as in the paper, would have buckets of any size and
cost n^2 when all keys fall into one.

Source: "Scatterbrain: Unifying Sparse and Low-rank Attention Approximation" (Chen, Dao, Winsor, Song, Rudra, Ré, 2021),
https://arxiv.org/abs/2110.15343. Departures: a support of bounded size; no subtraction; the causal form.
"""

import math
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import take_rows
from attnlens.linalg.hashed_blocks import Blocks, dyadic_cells, estimated_matrix, own_blocks
from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.random_features import gaussian_projections, positive_log_features

Partial = tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]


def hiding(hidden: Bool[Tensor, "*k"], like: Float[Tensor, "..."]) -> Float[Tensor, "*k"]:
    """-inf where hidden, else zero: a bias of `partial_attention`."""
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)


def feature_sums(
    blocks: Blocks, projections: Float[Tensor, "h f d"]
) -> tuple[Float[Tensor, "b h g f dv"], Float[Tensor, "b h g f"]]:
    """(o_f, l_f) over the keys of every block."""
    b, h, groups = blocks.members.shape[:3]
    y = take_rows(blocks.k * blocks.k.shape[-1] ** -0.25, blocks.members)
    # |y|^2/2 goes in as a coordinate: the `bias` of partial_attention receives no gradient.
    y = torch.cat([y, -y.square().sum(-1, keepdim=True) / 2], -1)
    rows = torch.cat([projections, torch.ones_like(projections[..., :1])], -1)
    rows = rows.repeat_interleave(groups, 0).expand(b, -1, -1, -1)
    bias = None
    if blocks.present is not None:
        bias = hiding(~blocks.present, y).expand(b, h, -1, -1).flatten(1, 2)[:, :, None]
    values = take_rows(blocks.v, blocks.members).flatten(1, 2)
    out, lse = partial_attention(rows, y.flatten(1, 2), values, bias=bias, scale=1.0)
    return out.unflatten(1, (h, groups)), lse.unflatten(1, (h, groups))


def shifted(part: Partial, step: int) -> Partial:
    """Every group's entry moved `step` groups on (back if negative); the places that are left are empty."""
    out, lse = part
    kept = slice(None, -step) if step > 0 else slice(-step, None)
    hole = torch.zeros_like(out[:, : abs(step)]), torch.full_like(lse[:, : abs(step)], -torch.inf)
    pairs = ((hole[0], out[:, kept]), (hole[1], lse[:, kept]))
    joined = [torch.cat(pair if step > 0 else pair[::-1], 1) for pair in pairs]
    return joined[0], joined[1]


def all_but_one(
    out: Float[Tensor, "b h g f dv"], lse: Float[Tensor, "b h g f"]
) -> tuple[Float[Tensor, "b h g f dv"], Float[Tensor, "b h g f"]]:
    """For every group the merged `(out, lse)` of all others: what comes before merged with what comes after."""
    (b, h, groups), sides = out.shape[:3], []
    for direction in (1, -1):
        part = shifted((out.flatten(0, 1), lse.flatten(0, 1)), direction)
        step = 1
        while step < groups - 1:
            part = merge(part, shifted(part, direction * step))
            step *= 2
        sides.append(part)
    out, lse = merge(*sides)
    return out.unflatten(0, (b, h)), lse.unflatten(0, (b, h))


def blocks_and_features(blocks: Blocks, *, projections: Float[Tensor, "heads f d"]) -> Partial:
    """An estimator of `hashed_blocks`: one kernel over the keys of the block and the features of the other blocks."""
    b, h, t, r, d = blocks.rows.shape
    w = projections.repeat_interleave(h // projections.shape[0], 0)
    values, mass = all_but_one(*feature_sums(blocks, w))
    own = blocks.owner
    mass = take_rows(mass, own) - math.log(w.shape[1])
    values = take_rows(values.flatten(3), own).unflatten(3, values.shape[3:])
    x, y = blocks.rows * d**-0.25, take_rows(blocks.k * d**-0.25, blocks.keys)
    rows = torch.cat([x, torch.ones_like(x[..., :1]), -x.square().sum(-1, keepdim=True) / 2], -1)
    keys = torch.cat([y, torch.zeros_like(y[..., :2])], -1)
    # An inner product with -inf has no gradient: what has no key enters with a finite mass and is hidden.
    lift = torch.stack([mass.clamp_min(torch.finfo(x.dtype).min / 4), torch.ones_like(mass)], -1)
    features = torch.cat([w[:, None].expand(b, h, t, -1, -1), lift], -1)
    bias = None
    if blocks.filled is not None:
        hidden = torch.cat([~blocks.filled.expand(blocks.keys.shape), mass == -torch.inf], -1)
        bias = hiding(hidden, x).flatten(1, 2)[:, :, None]
    out, lse = partial_attention(
        rows.flatten(1, 2),
        torch.cat([keys, features], 3).flatten(1, 2),
        torch.cat([take_rows(blocks.v, blocks.keys), values], 3).flatten(1, 2),
        bias=bias,
        scale=1.0,
    )
    return out.reshape(b, h, t * r, -1), lse.reshape(b, h, t * r)


def blocks_alone(blocks: Blocks) -> Partial:
    """An estimator of `hashed_blocks` that leaves all other blocks out: what is exact."""
    bias = None if blocks.filled is None else hiding(~blocks.filled, blocks.k).flatten(1, 2)[:, :, None]
    rows, keys, values = blocks.rows, take_rows(blocks.k, blocks.keys), take_rows(blocks.v, blocks.keys)
    out, lse = partial_attention(*(x.flatten(1, 2) for x in (rows, keys, values)), bias=bias)
    return out.reshape(*blocks.k.shape[:2], -1, blocks.v.shape[-1]), lse.reshape(*blocks.k.shape[:2], -1)


def signed_normalizer(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    projections: Float[Tensor, "h f d"],
    support: Bool[Tensor, "b h n m"],
) -> Float[Tensor, "b h n"]:
    """The row sums of phi(X) phi(Y)^T + S as the paper has them, over e^c with the largest exponent c of the row:
    materialized, for analysis. They are computed in the precision of `q`, and what cancels in it is lost."""
    scale = q.shape[-1] ** -0.25
    w = projections.expand(q.shape[0], -1, -1, -1)
    log_x, log_y = (positive_log_features(x * scale, w) for x in (q, k))
    # One stabilizer a row for both terms.
    log_phi, exact = log_x[..., None, :] + log_y[:, :, None], (q * scale) @ (k * scale).mT
    top = torch.maximum(log_phi.amax((-2, -1)), exact.amax(-1))[..., None]
    phi = (log_phi - top[..., None]).exp().sum(-1)
    residual = torch.where(support, (exact - top).exp() - phi, 0)
    return phi.sum(-1) + residual.sum(-1)


class Scatterbrain(AbstractAttention):
    """Hashed blocks and positive random features.

    Args:
        num_features: random features m, at least 1; multiples of `head_dim` fill their orthogonal blocks.
        block_size: keys of a block, at least 1.
        num_planes: bits of the code, 1 to 30.
        head_dim: of queries and keys.
        num_heads: each has its own planes and features.
        seed: of the planes and the features.
        orthogonal: features orthogonal within blocks of `head_dim` instead of independent.
    """

    family = "sampling"
    budget = "num_features"
    row_stochastic = True
    order = 0.5
    unbiased = True

    def __init__(
        self,
        num_features: int,
        block_size: int,
        num_planes: int,
        head_dim: int,
        num_heads: int,
        seed: int,
        orthogonal: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if not 1 <= num_planes <= 30:
            raise ValueError(f"`num_planes` must be 1 to 30, got {num_planes}: there are 2^num_planes codes")
        self.block_size = block_size
        generator = torch.Generator().manual_seed(seed)
        self.planes: Tensor
        self.projections: Tensor
        self.register_buffer("planes", torch.randn(num_heads, head_dim, num_planes, generator=generator, device="cpu"))
        draws = [
            gaussian_projections(num_features, head_dim, orthogonal=orthogonal, generator=generator)
            for _ in range(num_heads)
        ]
        self.register_buffer("projections", torch.stack(draws).float())

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With one block, whatever the features."""
        return {"block_size": length}

    def estimate(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
        """The output and the log of the estimated row sums."""
        form = dyadic_cells if causal else own_blocks
        rest = partial(blocks_and_features, projections=self.projections.to(q.dtype))
        return form(q, k, v, self.planes, (), self.block_size, rest, key_padding_mask=key_padding_mask)

    def support(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], *, causal: bool = False
    ) -> Bool[Tensor, "b h n m"]:
        """The pairs that are exact, materialized: analysis."""
        eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        form = dyadic_cells if causal else own_blocks
        # Codes do not change with the length of a query: a short one has equal weights on all keys it is paired with.
        short = q * 2.0**-60
        out, _ = form(short, k, eye, self.planes, (), self.block_size, blocks_alone, key_padding_mask=None)
        return out > 0

    def nonpositive_rows(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Int[Tensor, "b h"]:
        """How many row sums of the signed form, bidirectional and in the precision of `q`, are not positive; the form
        that is computed has none."""
        sums = signed_normalizer(q, k, self.projections.to(q.dtype), self.support(q, k))
        return (sums <= 0).sum(-1)

    def kernel(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], *, causal: bool = False
    ) -> Float[Tensor, "b h n m"]:
        """The matrix A~ before it is normalized."""
        return estimated_matrix(partial(self.estimate, q, causal=causal, key_padding_mask=None), k)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return self.estimate(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
