"""What the projections with a query, key and value for every head share: the linear maps, the heads, the caches.

y = concat_h(Attention(x Wq_h, x Wk_g(h), x Wv_g(h))) Wo,   g(h) = h // (H/G): H query heads, G key/value groups.

An operator of higher `arity` is given so many keys and values for every token, side by side. The optional short
convolution on q, k and v follows "Gated linear attention transformers with hardware-efficient training", Yang et al.,
2024.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention, AbstractRecurrentAttention
from attnlens.cache.base import AbstractCache
from attnlens.cache.full import Full
from attnlens.cache.growing import Growing
from attnlens.linalg.suffix import repeat_groups
from attnlens.position.base import AbstractPosition
from attnlens.projection.base import AbstractProjection
from attnlens.projection.convolution import ShortConvolution
from attnlens.projection.cost import Cost, Shape, grouped_cost


class MultiHeadCache(NamedTuple):
    """What decoding has to remember.

    state: of a recurrent operator; of the cache policy for exact attention; else a `Prefix`.
    past: the last inputs of the three short convolutions, (b, kernel - 1, w) each.
    policy: which keys and values are kept, or None where the operator does not attend to a cache.
    length, capacity: tokens so far and at most.
    """

    state: Any
    past: tuple[Tensor, ...]
    policy: AbstractCache | None
    length: int
    capacity: int


class Prefix(NamedTuple):
    """Queries, keys and values so far, for operators that compare places or queries with each other."""

    q: Growing
    k: Growing
    v: Growing


class Remembered(NamedTuple):
    """Keys and values of a memory, (b, g, m, d) each."""

    k: Tensor
    v: Tensor


class AbstractMultiHead(AbstractProjection):
    """Query, key and value heads around any operator; a subclass says how many groups of keys and values there are.

    Args:
        attention: the operator.
        width: of the tokens; a multiple of `num_heads`.
        num_heads: query heads, each of width `width / num_heads`.
        num_groups: key/value heads, a divisor of `num_heads`.
        position: rotates queries and keys, or None.
        packed: one matrix for q, k and v in place of three.
        short_convolution: number of taps of a causal depthwise convolution on q, k and v, or None.
        bias: whether the linear maps have one.

    Raises:
        ValueError: `width` is no multiple of `num_heads`, or `num_heads` none of `num_groups`.
    """

    def __init__(
        self,
        attention: AbstractAttention,
        width: int,
        num_heads: int,
        num_groups: int,
        *,
        position: AbstractPosition | None,
        packed: bool,
        short_convolution: int | None,
        bias: bool,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"`width` must be a multiple of `num_heads`, got {width} and {num_heads}")
        if not 1 <= num_groups <= num_heads or num_heads % num_groups:
            raise ValueError(f"`num_groups` must divide `num_heads`, got {num_groups} and {num_heads}")
        self.attention, self.position = attention, position
        self.extra = 0 if position is None else position.extra_dims
        self.width, self.num_heads, self.num_groups = width, num_heads, num_groups
        grouped = attention.arity * num_groups * (width // num_heads)
        self.widths = (width, grouped, grouped)
        sizes = [sum(self.widths)] if packed else self.widths
        self.inputs = nn.ModuleList(nn.Linear(width, size, bias=bias) for size in sizes)
        taps = 1 if short_convolution is None else short_convolution
        convolved = () if short_convolution is None else self.widths
        self.convolutions = nn.ModuleList(ShortConvolution(size, taps) for size in convolved)
        self.output = nn.Linear(width, width, bias=bias)
        self.num_past = taps - 1

    @classmethod
    def cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        return grouped_cost(shape, options.get("num_groups", shape.num_heads), new=new, past=past)

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
            return self.recall(self.remember(memory, key_padding_mask=key_padding_mask), x, key_padding_mask)
        q, k, v = self._project(x)
        if self.convolutions:
            q, k, v = (
                self._clean(q, key_padding_mask),
                self._clean(k, key_padding_mask),
                self._clean(v, key_padding_mask),
            )
            q, k, v = (self._convolve(part, z) for part, z in enumerate((q, k, v)))
        q, k, v = self._split(q, k, v)
        if self.position is not None:
            self.position.check_causal(causal)
        q, k = self._rotate(q, k)
        return self._merge(self._attend(q, k, v, causal, key_padding_mask))

    def remember(
        self, memory: Float[Tensor, "b m w"], *, key_padding_mask: Bool[Tensor, "b m"] | None = None
    ) -> Remembered:
        k, v = self._map(1, memory), self._map(2, memory)
        if self.convolutions:
            k, v = (self._convolve(part, self._clean(z, key_padding_mask)) for part, z in ((1, k), (2, v)))
        return Remembered(self._heads(k, self.num_groups), self._heads(v, self.num_groups))

    def recall(
        self, remembered: Remembered, x: Float[Tensor, "b n w"], key_padding_mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n w"]:
        q = self._map(0, x)
        q = self._heads(self._convolve(0, q) if self.convolutions else q, self.num_heads)
        return self._merge(self._attend(q, *remembered, False, key_padding_mask))

    def init_cache(self, batch: int, capacity: int, cache: AbstractCache | None = None) -> MultiHeadCache:
        like, head_dim = self.output.weight, self.width // self.num_heads
        key_dim = head_dim + self.extra
        past = tuple(like.new_zeros(batch, self.num_past, size) for size in self.widths[: len(self.convolutions)])
        policy = None
        if self.attention.caches:
            policy = Full() if cache is None else cache
            state = policy.init(batch, self.num_groups, key_dim, head_dim, capacity=capacity, like=like)
        elif cache is not None:
            raise ValueError(
                f"`cache` {type(cache).__name__} keeps keys and values for exact attention, and "
                f"{type(self.attention).__name__} has a decoding of its own: leave `cache` out, or use softmax"
            )
        elif isinstance(self.attention, AbstractRecurrentAttention):
            state = self.attention.init_state(batch, self.num_heads, key_dim, head_dim, like)
        else:
            tokens = self.attention.arity * key_dim, self.attention.arity * head_dim
            keys, values = (Growing.empty(batch, self.num_groups, size, like=like) for size in tokens)
            state = Prefix(Growing.empty(batch, self.num_heads, key_dim, like=like), keys, values)
        return MultiHeadCache(state, past, policy, length=0, capacity=capacity)

    def step(self, cache: MultiHeadCache, x: Float[Tensor, "b n w"]) -> tuple[MultiHeadCache, Float[Tensor, "b n w"]]:
        length = cache.length + x.shape[1]
        if length > cache.capacity:
            raise ValueError(f"`capacity` of the cache is {cache.capacity}, got token {length}; make a larger cache")
        inputs, past = self._project(x), cache.past
        if self.convolutions:
            pairs = list(zip(inputs, cache.past, strict=True))
            past = tuple(torch.cat([old, z], dim=1)[:, x.shape[1] :] for z, old in pairs)
            inputs = tuple(self.convolutions[part](z, old) for part, (z, old) in enumerate(pairs))
        q, k, v = self._split(*inputs)
        q, k = self._rotate(q, k, offset=cache.length)
        state, out = self._continue(cache, q, k, v)
        return MultiHeadCache(state, past, cache.policy, length, cache.capacity), self._merge(out)

    def _continue(self, cache: MultiHeadCache, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor]:
        if cache.policy is not None:
            return cache.policy.step(cache.state, q, k, v)
        if isinstance(self.attention, AbstractRecurrentAttention):
            return self.attention.step(
                cache.state, q, repeat_groups(k, self.num_heads), repeat_groups(v, self.num_heads)
            )
        # One query over the keys so far would do for softmax, but not for operators that compare places (a window)
        # or queries with each other (hashing, landmarks): the whole prefix is right for every causal operator.
        prefix = Prefix(*(old.append(new) for old, new in zip(cache.state, (q, k, v), strict=True)))
        out = self._attend(prefix.q.tensor, prefix.k.tensor, prefix.v.tensor, True, None)
        return prefix, out[:, :, -q.shape[2] :]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, key_padding_mask: Tensor | None) -> Tensor:
        k, v = repeat_groups(k, self.num_heads), repeat_groups(v, self.num_heads)
        return self.attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if len(self.inputs) == 3:
            return tuple(to(x) for to in self.inputs)
        return self.inputs[0](x).split(self.widths, dim=-1)

    def _map(self, part: int, x: Tensor) -> Tensor:
        """Queries (part 0), keys (1) or values (2) alone."""
        if len(self.inputs) == 3:
            return self.inputs[part](x)
        packed = self.inputs[0]
        assert isinstance(packed, nn.Linear), "built so"
        rows = slice(sum(self.widths[:part]), sum(self.widths[: part + 1]))
        return nn.functional.linear(x, packed.weight[rows], None if packed.bias is None else packed.bias[rows])

    def _clean(self, z: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        # The convolution must not carry padding, which may hold anything, into the real tokens beside it.
        return z if key_padding_mask is None else torch.where(key_padding_mask[..., None], z, 0)

    def _convolve(self, part: int, z: Tensor) -> Tensor:
        return self.convolutions[part](z, z.new_zeros(z.shape[0], self.num_past, z.shape[2]))

    def _rotate(self, q: Tensor, k: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and every key of a token by its position."""
        if self.position is None:
            return q, k
        pairs = [self.position.rotate(q, part, offset=offset) for part in k.chunk(self.attention.arity, dim=-1)]
        keys = [key for _, key in pairs]
        return pairs[0][0], keys[0] if len(keys) == 1 else torch.cat(keys, -1)

    def _split(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads(q, self.num_heads), self._heads(k, self.num_groups), self._heads(v, self.num_groups)

    def _heads(self, z: Float[Tensor, "b n w"], heads: int) -> Float[Tensor, "b h n d"]:
        """Into heads; several keys or values of a token stay side by side in their head."""
        return z.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _merge(self, out: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n w"]:
        return self.output(out.transpose(1, 2).flatten(2))
