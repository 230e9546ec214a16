"""A causal Transformer: a token sees itself and those before it.

Reference: "Improving language understanding by generative pre-training", Radford et al., 2018.
"""

from typing import ClassVar, NamedTuple, final

from jaxtyping import Float, Int
from torch import Tensor

from attnlens.models.base import AbstractModel


class DecoderCache(NamedTuple):
    """The caches of the layers and the number of tokens so far."""

    layers: tuple[tuple, ...]
    length: int


@final
class Decoder(AbstractModel):
    """Token ids to logits through causal attention; also token by token."""

    causal: ClassVar[bool] = True

    def init_cache(self, batch: int, capacity: int) -> DecoderCache:
        """The cache before the first of at most `capacity` tokens."""
        return DecoderCache(tuple(block.projection.init_cache(batch, capacity) for block in self.layers), length=0)

    def step(self, cache: DecoderCache, input_ids: Int[Tensor, "b n"]) -> tuple[DecoderCache, Float[Tensor, "b n c"]]:
        """Continue by n >= 1 tokens: the new cache and the logits that one causal run would give them."""
        x = self.position.embed(self.embedding(input_ids), offset=cache.length)
        layers = []
        for block, old in zip(self.layers, cache.layers, strict=True):
            new, x = block.step(old, x)
            layers.append(new)
        return DecoderCache(tuple(layers), cache.length + input_ids.shape[1]), self.head(self.norm(x))
