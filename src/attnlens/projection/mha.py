"""Multi-head attention: one query, key and value per head, all of the same width.

y = concat_h(Attention(x Wq_h, x Wk_h, x Wv_h)) Wo

An operator of higher `arity` is given so many keys and values of that width for every token, side by side.

Reference: "Attention is all you need", Vaswani et al., 2017. The optional short convolution on q, k and v follows
"Gated linear attention transformers with hardware-efficient training", Yang et al., 2024.
"""

from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention, AbstractRecurrentAttention
from attnlens.position.base import AbstractPosition
from attnlens.projection.base import AbstractProjection
from attnlens.projection.convolution import ShortConvolution


class MhaCache(NamedTuple):
    """What decoding has to remember.

    state: of a recurrent operator; otherwise the queries, keys and values so far, (b, h, length, d) each.
    past: the last inputs of the three short convolutions, (b, kernel - 1, w) each.
    length, capacity: tokens so far and at most.
    """

    state: tuple
    past: tuple[Tensor, ...]
    length: int
    capacity: int


@final
class Mha(AbstractProjection):
    """Multi-head attention around any operator.

    Args:
        attention: the operator.
        width: of the tokens; a multiple of `num_heads`.
        num_heads: each of width `width / num_heads`.
        position: rotates queries and keys, or None.
        packed: one matrix for q, k and v in place of three.
        short_convolution: number of taps of a causal depthwise convolution on q, k and v, or None.
        bias: whether the linear maps have one.

    Raises:
        ValueError: `width` is no multiple of `num_heads`.
    """

    def __init__(
        self,
        attention: AbstractAttention,
        width: int,
        num_heads: int,
        *,
        position: AbstractPosition | None = None,
        packed: bool = False,
        short_convolution: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"`width` must be a multiple of `num_heads`, got {width} and {num_heads}")
        self.attention, self.position = attention, position
        self.width, self.num_heads = width, num_heads
        self.widths = (width, attention.arity * width, attention.arity * width)
        sizes = [sum(self.widths)] if packed else self.widths
        self.inputs = nn.ModuleList(nn.Linear(width, size, bias=bias) for size in sizes)
        taps = 1 if short_convolution is None else short_convolution
        convolved = () if short_convolution is None else self.widths
        self.convolutions = nn.ModuleList(ShortConvolution(size, taps) for size in convolved)
        self.output = nn.Linear(width, width, bias=bias)
        self.num_past = taps - 1

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        *,
        memory: Float[Tensor, "b m w"] | None = None,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        if memory is not None and causal:
            raise ValueError("`causal=True` has no meaning over a `memory`: its tokens are all in the past")
        q, k, v = self._project(x, x if memory is None else memory)
        if self.convolutions:
            if key_padding_mask is not None:
                # The convolution must not carry padding, which may hold anything, into the real tokens beside it.
                real = key_padding_mask[..., None]
                q = torch.where(real, q, 0) if memory is None else q
                k, v = torch.where(real, k, 0), torch.where(real, v, 0)
            past = (x.new_zeros(x.shape[0], self.num_past, size) for size in self.widths)
            triples = zip(self.convolutions, (q, k, v), past, strict=True)
            q, k, v = (convolve(z, nothing) for convolve, z, nothing in triples)
        q, k, v = self._split(q), self._split(k), self._split(v)
        if memory is None:
            q, k = self._rotate(q, k)
        return self._merge(self.attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask))

    def init_cache(self, batch: int, capacity: int) -> MhaCache:
        like = self.output.weight
        head_dim = self.width // self.num_heads
        if isinstance(self.attention, AbstractRecurrentAttention):
            state = self.attention.init_state(batch, self.num_heads, head_dim, head_dim, like)
        else:
            heads = [size // self.num_heads for size in self.widths]
            state = tuple(like.new_zeros(batch, self.num_heads, 0, size) for size in heads)
        past = tuple(like.new_zeros(batch, self.num_past, size) for size in self.widths[: len(self.convolutions)])
        return MhaCache(state, past, length=0, capacity=capacity)

    def step(self, cache: MhaCache, x: Float[Tensor, "b n w"]) -> tuple[MhaCache, Float[Tensor, "b n w"]]:
        length = cache.length + x.shape[1]
        if length > cache.capacity:
            raise ValueError(f"`capacity` of the cache is {cache.capacity}, got token {length}; make a larger cache")
        inputs, past = self._project(x, x), cache.past
        if self.convolutions:
            triples = zip(self.convolutions, inputs, cache.past, strict=True)
            past = tuple(torch.cat([old, z], dim=1)[:, x.shape[1] :] for z, old in zip(inputs, cache.past, strict=True))
            inputs = tuple(convolve(z, old) for convolve, z, old in triples)
        q, k, v = (self._split(z) for z in inputs)
        q, k = self._rotate(q, k, offset=cache.length)
        state, out = self._continue(cache.state, q, k, v)
        return MhaCache(state, past, length, cache.capacity), self._merge(out)

    def _continue(self, state: tuple, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple, Tensor]:
        if isinstance(self.attention, AbstractRecurrentAttention):
            return self.attention.step(state, q, k, v)
        # One query over the keys so far would do for softmax, but not for operators that compare places (a window)
        # or queries with each other (hashing, landmarks): the whole prefix is right for every causal operator.
        prefix = tuple(torch.cat([old, new], dim=2) for old, new in zip(state, (q, k, v), strict=True))
        return prefix, self.attention(*prefix, causal=True)[:, :, -q.shape[2] :]

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if len(self.inputs) == 3:
            to_q, to_k, to_v = self.inputs
            return to_q(x), to_k(source), to_v(source)
        if source is x:
            q, k, v = self.inputs[0](x).split(self.widths, dim=-1)
            return q, k, v
        q = self.inputs[0](x)[..., : self.width]
        k, v = self.inputs[0](source)[..., self.width :].chunk(2, dim=-1)
        return q, k, v

    def _rotate(self, q: Tensor, k: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and every key of a token by its position."""
        if self.position is None:
            return q, k
        pairs = [self.position.rotate(q, part, offset=offset) for part in k.chunk(self.attention.arity, dim=-1)]
        keys = [key for _, key in pairs]
        return pairs[0][0], keys[0] if len(keys) == 1 else torch.cat(keys, -1)

    def _split(self, z: Float[Tensor, "b n w"]) -> Float[Tensor, "b h n d"]:
        return z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _merge(self, out: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n w"]:
        return self.output(out.transpose(1, 2).flatten(2))
