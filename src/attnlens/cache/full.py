"""Every key and value of the past: with the store `Plain` decoding equals one causal run.

2 G d floats a token for G key/value groups of width d, or what another store makes of them; O(N G d) a step.

Source: "Fast Transformer Decoding: One Write-Head is All You Need" (Shazeer, 2019),
https://arxiv.org/abs/1911.02150.
"""

from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from attnlens.cache.base import AbstractCache
from attnlens.cache.plain import Plain
from attnlens.cache.store import AbstractStore
from attnlens.linalg.suffix import suffix_attention


@final
class Full(AbstractCache):
    """Keeps everything; its state is that of the store.

    Args:
        store: how entries are written down; `Plain` where None.
    """

    def __init__(self, store: AbstractStore | None = None) -> None:
        self.store = store or Plain()

    def init(self, batch: int, num_groups: int, key_dim: int, value_dim: int, *, capacity: int, like: Tensor) -> Any:
        return self.store.init(batch, num_groups, key_dim, value_dim, like=like)

    def step(
        self,
        state: Any,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        v: Float[Tensor, "b g n dv"],
    ) -> tuple[Any, Float[Tensor, "b h n dv"]]:
        state, keys, values = self.store.extend(state, k, v)
        return state, suffix_attention(q, keys, values)
