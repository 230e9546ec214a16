"""What a projection is: it owns the weights, the positions and the cache around one attention operator."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.cache.base import AbstractCache
from attnlens.projection.cost import Cost, Shape


class Dims(NamedTuple):
    """The widths that others need before a projection exists.

    head_dim: of the queries and keys that the operator is given.
    rotary_dim: of what a rotating position turns.
    """

    head_dim: int
    rotary_dim: int


class AbstractProjection(nn.Module, ABC):
    """x (and optional memory) to y through `self.attention`.

    Any operator runs under any projection where shapes allow. Decoding passes a cache along as a value: `step`
    returns a new one and leaves its argument as it was, so that two continuations can start from one prefix.
    """

    attention: AbstractAttention

    @classmethod
    def dims(cls, width: int, num_heads: int, options: Mapping[str, Any]) -> Dims:
        """The widths under the further arguments `options` of the constructor."""
        return Dims(width // num_heads, width // num_heads)

    @classmethod
    def cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        """What a causal run over `new` tokens after `past` cached ones costs, all pairs counted, by formula.

        For any operator that multiplies scores out, under the further arguments `options` of the constructor.
        """
        raise NotImplementedError(f"{cls.__name__} states no cost")

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

    def remember(self, memory: Float[Tensor, "b m w"], *, key_padding_mask: Bool[Tensor, "b m"] | None = None) -> Any:
        """What `recall` needs of a memory, computed once for all steps of decoding; the memory itself by default."""
        return memory

    def recall(
        self, remembered: Any, x: Float[Tensor, "b n w"], key_padding_mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n w"]:
        """Attend from `x` to a remembered memory: equal to `forward(x, memory=memory, ...)`."""
        return self(x, memory=remembered, key_padding_mask=key_padding_mask)

    @abstractmethod
    def init_cache(self, batch: int, capacity: int, cache: AbstractCache | None = None) -> Any:
        """The cache (a NamedTuple) before the first of at most `capacity` tokens.

        `cache` says which keys and values exact attention keeps (all of them by default).

        Raises:
            ValueError: a `cache` that the projection or its operator has no use for.
        """

    @abstractmethod
    def step(self, cache: Any, x: Float[Tensor, "b n w"]) -> tuple[Any, Float[Tensor, "b n w"]]:
        """Continue a causal run by n >= 1 tokens: the new cache and their outputs, equal to those of one run.

        Raises:
            ValueError: more tokens than the cache's capacity, or an operator that cannot be causal.
        """
