"""Every key and value of the past: decoding equals one causal run.

2 G d floats a token for G key/value groups of width d; O(N G d) a step.

Source: "Fast Transformer Decoding: One Write-Head is All You Need" (Shazeer, 2019),
https://arxiv.org/abs/1911.02150.
"""

from typing import NamedTuple, final

from jaxtyping import Float
from torch import Tensor

from attnlens.cache.base import AbstractCache
from attnlens.cache.growing import Growing
from attnlens.linalg.suffix import suffix_attention


class FullState(NamedTuple):
    """Keys (b, g, m, d) and values (b, g, m, dv) so far."""

    keys: Growing
    values: Growing


@final
class Full(AbstractCache):
    """Keeps everything."""

    def init(
        self, batch: int, num_groups: int, key_dim: int, value_dim: int, *, capacity: int, like: Tensor
    ) -> FullState:
        return FullState(
            Growing.empty(batch, num_groups, key_dim, like=like), Growing.empty(batch, num_groups, value_dim, like=like)
        )

    def step(
        self,
        state: FullState,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        v: Float[Tensor, "b g n dv"],
    ) -> tuple[FullState, Float[Tensor, "b h n dv"]]:
        state = FullState(state.keys.append(k), state.values.append(v))
        return state, suffix_attention(q, state.keys.tensor, state.values.tensor)
