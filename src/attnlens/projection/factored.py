"""What the projections share whose heads are functions of fewer numbers than the heads hold: those are what is cached.

A token keeps a few short vectors c_j, from which the keys and values of all heads follow, K_h = K_h(c_j) and
V_h = V_h(c_j). Two forms of the same attention:

    expanded    out_i = Attention(q_i, K(c), V(c)), for any operator;
    compressed  out_i = mix(softmax(scores(q_i, c)), c), the maps merged into queries and outputs, for exact attention.

The compressed form reads only what is cached and does more arithmetic for every pair of a query and a key: it wins
while the queries are few, which is decoding, and loses for a prompt. Sources and costs stand with the subclasses.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention, AbstractRecurrentAttention
from attnlens.cache.base import AbstractCache
from attnlens.cache.full import Full
from attnlens.cache.growing import Growing
from attnlens.cache.plain import Plain
from attnlens.linalg.suffix import suffix_attention
from attnlens.position.base import AbstractPosition
from attnlens.projection.base import AbstractProjection
from attnlens.projection.cost import Cost, Shape
from attnlens.projection.multihead import Prefix

# At most so many tokens of one call attend in the compressed form. A heuristic: over 4096 cached tokens and 16 heads of
# 128, the expanded form is faster from 32 tokens on for tensor products of rank 2, beyond 128 for latents of 512.
FEW = 16

Kept = tuple[Float[Tensor, "b _ _"], ...]


class FactoredCache(NamedTuple):
    """What decoding has to remember.

    state: under exact attention one `Growing` for each of the kept vectors, or that of the cache policy; the state of a
        recurrent operator; else a `Prefix` of expanded queries, keys and values.
    policy: which keys and values are kept, or None where everything is.
    length, capacity: tokens so far and at most.
    """

    state: Any
    policy: AbstractCache | None
    length: int
    capacity: int


class AbstractFactored(AbstractProjection):
    """Heads that expand from what a token keeps; a subclass holds the maps.

    Attributes set by a subclass before use: `num_heads`; `head_dims`, the widths of the keys and of the values that the
    operator is given; `kept`, the widths of the vectors that decoding keeps of a token; `scale` of the scores.

    Args:
        attention: the operator; of arity 1.
        position: turns what the subclass lets it turn, or None.

    Raises:
        ValueError: an operator of higher arity.
    """

    num_heads: int
    head_dims: tuple[int, int]
    kept: tuple[int, ...]
    scale: float

    def __init__(self, attention: AbstractAttention, position: AbstractPosition | None) -> None:
        super().__init__()
        if attention.arity > 1:
            raise ValueError(
                f"`attention` {type(attention).__name__} takes {attention.arity} keys for every token and "
                f"{type(self).__name__} makes one: use projection=mha"
            )
        if position is not None and position.extra_dims:
            raise ValueError(
                f"`position` {type(position).__name__} widens queries and keys, which {type(self).__name__} does not "
                "hold as they are: use position=rope, or projection=mha, gqa or mqa"
            )
        self.attention, self.position = attention, position

    @classmethod
    @abstractmethod
    def compressed_cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        """As `cost`, which is that of the expanded form, of the compressed one."""

    @abstractmethod
    def query(self, x: Float[Tensor, "b n w"]) -> tuple[Tensor, ...]:
        """What the queries of `x` expand from."""

    @abstractmethod
    def keep(self, x: Float[Tensor, "b n w"]) -> Kept:
        """What is kept of `x`, in the order of `kept`."""

    def place(self, query: tuple[Tensor, ...], kept: Kept, offset: int) -> tuple[tuple[Tensor, ...], Kept]:
        """Both, of the same tokens from number `offset` on, with their positions in them."""
        return query, kept

    @abstractmethod
    def expand_query(self, query: tuple[Tensor, ...]) -> Float[Tensor, "b h n d"]:
        """The queries of all heads, scaled so that 1/sqrt(d) of the operator makes `scale` of it."""

    @abstractmethod
    def expand(self, kept: Kept) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]]:
        """The keys and values of all heads."""

    @abstractmethod
    def scores(self, query: tuple[Tensor, ...], kept: Kept) -> Float[Tensor, "b h n m"]:
        """The scaled scores, without keys."""

    @abstractmethod
    def mix(self, weights: Float[Tensor, "b h n m"], kept: Kept) -> Float[Tensor, "b h n dv"]:
        """The weighted means of values, without values."""

    @abstractmethod
    def merge(self, out: Float[Tensor, "b h n dv"]) -> Float[Tensor, "b n w"]:
        """The outputs of all heads to one."""

    @property
    def policy_dims(self) -> tuple[int, int, int]:
        """Groups and widths of the keys and values that a cache policy chooses among."""
        return (self.num_heads, *self.head_dims)

    def for_policy(
        self, query: tuple[Tensor, ...], kept: Kept
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b g n d"], Float[Tensor, "b g n dv"]]:
        """Queries, keys and values for a cache policy: those of all heads, unless fewer numbers will do."""
        return self.expand_query(query), *self.expand(kept)

    def from_policy(self, out: Float[Tensor, "b h n _"]) -> Float[Tensor, "b h n dv"]:
        """The outputs of the heads from those of a policy."""
        return out

    @property
    def cache_floats(self) -> int:
        """What exact attention caches of a token."""
        return sum(self.kept)

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        *,
        memory: Float[Tensor, "b m w"] | None = None,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        if memory is not None:
            if causal:
                raise ValueError("`causal=True` has no meaning over a `memory`: its tokens are all in the past")
            q, (k, v) = self.expand_query(self.query(x)), self.expand(self.keep(memory))
        else:
            query, kept = self.place(self.query(x), self.keep(x), 0)
            q, (k, v) = self.expand_query(query), self.expand(kept)
        return self.merge(self.attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask))

    def remember(
        self, memory: Float[Tensor, "b m w"], *, key_padding_mask: Bool[Tensor, "b m"] | None = None
    ) -> tuple[Tensor, ...]:
        """What is kept of the memory under exact attention, zeros of its padding; else keys and values of all heads."""
        kept = self.keep(memory)
        if key_padding_mask is not None:
            # 0 * NaN is NaN: a weight of zero does not hide what padding may hold.
            kept = tuple(torch.where(key_padding_mask[..., None], part, 0) for part in kept)
        return kept if self.attention.caches else self.expand(kept)

    def recall(
        self,
        remembered: tuple[Tensor, ...],
        x: Float[Tensor, "b n w"],
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        query = self.query(x)
        if self.attention.caches and x.shape[1] <= FEW:
            hidden = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
            return self.merge(self.attend_compressed(query, remembered, hidden))
        k, v = self.expand(remembered) if self.attention.caches else remembered
        return self.merge(self.attention(self.expand_query(query), k, v, key_padding_mask=key_padding_mask))

    def init_cache(self, batch: int, capacity: int, cache: AbstractCache | None = None) -> FactoredCache:
        if cache is not None and not self.attention.caches:
            raise ValueError(
                f"`cache` {type(cache).__name__} keeps keys and values for exact attention, and "
                f"{type(self.attention).__name__} has a decoding of its own: leave `cache` out, or use softmax"
            )
        # What keeps all keys and values as they come is kept here in fewer numbers.
        whole = isinstance(cache, Full) and isinstance(cache.store, Plain)
        policy = None if whole else cache
        return FactoredCache(self._init_state(batch, capacity, policy), policy, length=0, capacity=capacity)

    def _init_state(self, batch: int, capacity: int, policy: AbstractCache | None) -> Any:
        like, (key_dim, value_dim) = next(self.parameters()), self.head_dims
        if policy is not None:
            return policy.init(batch, *self.policy_dims, capacity=capacity, like=like)
        if self.attention.caches:
            return tuple(Growing.empty(batch, width, like=like) for width in self.kept)
        if isinstance(self.attention, AbstractRecurrentAttention):
            return self.attention.init_state(batch, self.num_heads, key_dim, value_dim, like)
        widths = (key_dim, key_dim, value_dim)
        return Prefix(*(Growing.empty(batch, self.num_heads, width, like=like) for width in widths))

    def step(self, cache: FactoredCache, x: Float[Tensor, "b n w"]) -> tuple[FactoredCache, Float[Tensor, "b n w"]]:
        length = cache.length + x.shape[1]
        if length > cache.capacity:
            raise ValueError(f"`capacity` of the cache is {cache.capacity}, got token {length}; make a larger cache")
        query, kept = self.place(self.query(x), self.keep(x), cache.length)
        state, out = self._continue(cache, query, kept)
        return FactoredCache(state, cache.policy, length, cache.capacity), self.merge(out)

    def _continue(self, cache: FactoredCache, query: tuple[Tensor, ...], kept: Kept) -> tuple[Any, Tensor]:
        if cache.policy is not None:
            state, out = cache.policy.step(cache.state, *self.for_policy(query, kept))
            return state, self.from_policy(out)
        n = kept[0].shape[1]
        if self.attention.caches:
            state = tuple(old.append(new) for old, new in zip(cache.state, kept, strict=True))
            return state, self._last(query, tuple(part.tensor for part in state), n)
        q, (k, v) = self.expand_query(query), self.expand(kept)
        if isinstance(self.attention, AbstractRecurrentAttention):
            return self.attention.step(cache.state, q, k, v)
        # The whole prefix: the operator may compare places or queries with each other, see `AbstractMultiHead`.
        prefix = Prefix(*(old.append(new) for old, new in zip(cache.state, (q, k, v), strict=True)))
        out = self.attention(prefix.q.tensor, prefix.k.tensor, prefix.v.tensor, causal=True)
        return prefix, out[:, :, -n:]

    def _last(self, query: tuple[Tensor, ...], kept: Kept, n: int) -> Tensor:
        """Exact causal attention of the last n tokens."""
        m = kept[0].shape[1]
        if n > FEW:
            return suffix_attention(self.expand_query(query), *self.expand(kept))
        hidden = None if n == 1 else torch.ones(n, m, dtype=torch.bool, device=kept[0].device).triu(m - n + 1)
        return self.attend_compressed(query, kept, hidden)

    def attend_compressed(
        self, query: tuple[Tensor, ...], kept: Kept, hidden: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b h n dv"]:
        """Exact attention without keys and values; `hidden` broadcasts to (b, h, n, m), None hides nothing."""
        scores = self.scores(query, kept)
        at_least = torch.promote_types(scores.dtype, torch.float32)
        if hidden is None:
            return self.mix(torch.softmax(scores, -1, dtype=at_least).to(scores.dtype), kept)
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1, dtype=at_least)
        # Where nothing is seen the softmax is NaN, and the answer zero.
        return self.mix(weights.masked_fill(hidden, 0).to(scores.dtype), kept)
