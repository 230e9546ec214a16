"""Causal products with a kernel of finitely many features, by chunks: prefix sums that are never materialized.

For features f(q_i), f(k_j) >= 0 in R^m and values v_j,

    out_i = sum_{j <= i} <f(q_i), f(k_j)> v_j / sum_{j <= i} <f(q_i), f(k_j)>
          = (f(q_i) S_i) / (f(q_i) z_i),   S_i = sum_{j <= i} f(k_j) v_j^T,   z_i = sum_{j <= i} f(k_j).

Within a chunk of c tokens the masked c x c products are formed, across chunks one running (S, z) is kept: time
O(n m dv + n c (m + dv)), memory O(m dv + c^2) beside the inputs. One running state beats all states at once
on a CPU, since it stays in cache.

Source: "Transformers are RNNs" (Katharopoulos et al., 2020), https://arxiv.org/abs/2006.16236; the chunked form is that
of "Gated Linear Attention Transformers with Hardware-Efficient Training" (Yang et al., 2024).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SHORTEST, LONGEST = 16, 64


def chunk_length(length: int) -> int:
    """Tokens of a chunk: a quarter of the sequence, between 16 and 64.

    One chunk over a short sequence would form the whole masked matrix and cost as much as exact attention; chunks below
    16 cost more in calls than they save in products.
    """
    return max(SHORTEST, min(LONGEST, -(-length // 4)))


class PrefixState(NamedTuple):
    """The sums over the keys so far: S of features times values, z of features."""

    moment: Float[Tensor, "b h m dv"]
    mass: Float[Tensor, "b h m"]


def normalized(numerator: Float[Tensor, "b h n dv"], normalizer: Float[Tensor, "b h n"]) -> Float[Tensor, "b h n dv"]:
    """numerator / normalizer, and zero where the normalizer is (a query that saw nothing)."""
    empty = normalizer == 0
    return (numerator / torch.where(empty, 1, normalizer)[..., None]).masked_fill(empty[..., None], 0)


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
    outs, n = [], v.shape[2]
    chunk = chunk_length(n) if chunk is None else chunk
    for start in range(0, n, chunk):
        queries, keys, values = (x[:, :, start : start + chunk] for x in (f_q, f_k, v))
        weights = (queries @ keys.mT).tril()
        numerator, normalizer = weights @ values, weights.sum(-1)
        if state is not None:
            numerator = numerator + queries @ state.moment
            normalizer = normalizer + (queries @ state.mass[..., None]).squeeze(-1)
        outs.append(normalized(numerator, normalizer))
        if final_state or start + chunk < n:
            fresh = PrefixState(keys.mT @ values, keys.sum(-2))
            state = fresh if state is None else PrefixState(state.moment + fresh.moment, state.mass + fresh.mass)
    return state, torch.cat(outs, 2)
