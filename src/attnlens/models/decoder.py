"""A causal Transformer: a token sees itself and those before it.

Reference: "Improving language understanding by generative pre-training", Radford et al., 2018.
"""

from typing import ClassVar, NamedTuple, final

from jaxtyping import Float, Int
from torch import Tensor

from attnlens.cache.base import AbstractCache
from attnlens.models.base import AbstractStack
from attnlens.models.block import BlockCache, Memory


class DecoderCache(NamedTuple):
    """The caches of the layers and the number of tokens so far."""

    layers: tuple[BlockCache, ...]
    length: int


@final
class Decoder(AbstractStack):
    """Token ids to logits through causal attention; also token by token."""

    causal: ClassVar[bool] = True

    def init_cache(
        self, batch: int, capacity: int, *, cache: AbstractCache | None = None, memory: Memory | None = None
    ) -> DecoderCache:
        """The cache before the first of at most `capacity` tokens; `cache` says what exact attention keeps."""
        layers = (block.init_cache(batch, capacity, cache, memory) for block in self.layers)
        return DecoderCache(tuple(layers), length=0)

    def step(self, cache: DecoderCache, input_ids: Int[Tensor, "b n"]) -> tuple[DecoderCache, Float[Tensor, "b n c"]]:
        """Continue by n >= 1 tokens: the new cache and the logits that one causal run would give them."""
        x = self.embed(input_ids, offset=cache.length)
        layers = []
        for block, old in zip(self.layers, cache.layers, strict=True):
            new, x = block.step(old, x)
            layers.append(new)
        return DecoderCache(tuple(layers), cache.length + input_ids.shape[1]), self.head(self.norm(x))
