"""Causal products with a kernel of finitely many features, by chunks: prefix sums that are never materialized.

For features f(q_i), f(k_j) in R^m with positive kernel and values v_j,

    out_i = sum_{j <= i} <f(q_i), f(k_j)> v_j / sum_{j <= i} <f(q_i), f(k_j)>
          = (f(q_i) S_i) / (f(q_i) z_i),   S_i = sum_{j <= i} f(k_j) v_j^T,   z_i = sum_{j <= i} f(k_j).

The normalizer is the numerator of values that are one, so (S, z) is one state of dv + 1 columns and the chunks are
those of attnlens.linalg.scan: time O(n m dv + n c (m + dv)) for chunks of c, memory O(n m dv / c).

Source: "Transformers are RNNs" (Katharopoulos et al., 2020), https://arxiv.org/abs/2006.16236.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.scan import chunked_scan


class PrefixState(NamedTuple):
    """The sums over the keys so far: S of features times values, z of features."""

    moment: Float[Tensor, "b h m dv"]
    mass: Float[Tensor, "b h m"]


def empty_prefix(batch: int, num_heads: int, num_features: int, value_dim: int, like: Tensor) -> PrefixState:
    """The sums over no key, on the device of `like` and in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    mass = torch.zeros(batch, num_heads, num_features, dtype=dtype, device=like.device)
    return PrefixState(mass.new_zeros(*mass.shape, value_dim), mass)


def normalized(
    numerator: Float[Tensor, "*batch n dv"], normalizer: Float[Tensor, "*batch n"]
) -> Float[Tensor, "*batch n dv"]:
    """numerator / normalizer, and zero where the normalizer is (a query that saw nothing)."""
    # A division, not a product with 1 / normalizer: the gradient of that is 1 / normalizer^2, which overflows in
    # float32 for normalizers below e^-44 that are in range otherwise.
    return numerator / normalizer.masked_fill(normalizer == 0, torch.inf)[..., None]


def kernel_attention(
    f_q: Float[Tensor, "b h n m"], f_k: Float[Tensor, "b h l m"], v: Float[Tensor, "b h l dv"]
) -> Float[Tensor, "b h n dv"]:
    """The bidirectional form: every query over every key; a padded key has zero features."""
    return normalized(f_q @ (f_k.mT @ v), (f_q @ f_k.sum(-2)[..., None]).squeeze(-1))


def causal_kernel_attention(
    f_q: Float[Tensor, "b h n m"],
    f_k: Float[Tensor, "b h n m"],
    v: Float[Tensor, "b h n dv"],
    state: PrefixState | None = None,
    final_state: bool = False,
    chunk: int | None = None,
) -> tuple[PrefixState | None, Float[Tensor, "b h n dv"]]:
    """Every query over the keys up to its own and those in `state`; the state after the last token where
    `final_state` asks for it."""
    past = None if state is None else torch.cat([state.moment, state.mass[..., None]], -1)
    values = F.pad(v, (0, 1), value=1.0)
    after, out = chunked_scan(f_q, f_k, values, state=past, final_state=final_state, chunk=chunk)
    new = None if after is None else PrefixState(after[..., :-1], after[..., -1])
    return new, normalized(out[..., :-1], out[..., -1])
