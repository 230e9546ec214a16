"""What a projection is: it owns the weights, the positions and the cache around one attention operator."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention


class AbstractProjection(nn.Module, ABC):
    """x (and optional memory) to y through `self.attention`.

    Any operator runs under any projection where shapes allow. Decoding passes a cache along as a value: `step`
    returns a new one and leaves its argument as it was, so that two continuations can start from one prefix.
    """

    attention: AbstractAttention

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "b n w"],
        *,
        memory: Float[Tensor, "b m w"] | None = None,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        """Attend from `x` to `memory`, or to `x` itself without one.

        `key_padding_mask` (True = real) belongs to what is attended to. Positions apply to self-attention only.

        Raises:
            ValueError: causal attention over a memory, or whatever the operator refuses.
        """

    @abstractmethod
    def init_cache(self, batch: int, capacity: int) -> tuple:
        """The cache (a NamedTuple) before the first of at most `capacity` tokens."""

    @abstractmethod
    def step(self, cache: Any, x: Float[Tensor, "b n w"]) -> tuple[Any, Float[Tensor, "b n w"]]:
        """Continue a causal run by n >= 1 tokens: the new cache and their outputs, equal to those of one run.

        Raises:
            ValueError: more tokens than the cache's capacity, or an operator that cannot be causal.
        """
