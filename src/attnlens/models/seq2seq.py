"""An encoder of one sequence and a decoder of another, whose layers also attend to what the encoder made.

Reference: "Attention is all you need", Vaswani et al., 2017.
"""

from typing import ClassVar, final

from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.cache.base import AbstractCache
from attnlens.models.base import AbstractKit, AbstractModel
from attnlens.models.block import AbstractBlock, Memory
from attnlens.models.decoder import Decoder, DecoderCache
from attnlens.models.encoder import Encoder


@final
class Seq2Seq(AbstractModel):
    """Source ids and the target ids so far to logits of the next target token.

    Args:
        encoder: its head leaves vectors as they are.
        decoder: its blocks have a part that attends to the memory.

    Raises:
        ValueError: a decoder without such parts.
    """

    causal: ClassVar[bool] = True

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        if any(block.cross is None for block in decoder.layers):
            raise ValueError(
                "`decoder` has blocks without `cross`: give each one a projection that attends to a memory"
            )
        self.encoder, self.decoder = encoder, decoder

    @classmethod
    def assemble(cls, kit: AbstractKit) -> "AbstractModel":
        return cls(Encoder(*kit.source_parts()), Decoder(*kit.target_parts()))

    @property
    def layers(self) -> list[AbstractBlock]:
        """Those of the encoder, then those of the decoder."""
        return [*self.encoder.layers, *self.decoder.layers]

    def encode(self, input_ids: Int[Tensor, "b m"], *, key_padding_mask: Bool[Tensor, "b m"] | None = None) -> Memory:
        """What the decoder attends to."""
        return Memory(self.encoder(input_ids, key_padding_mask=key_padding_mask), key_padding_mask)

    def forward(
        self,
        input_ids: Int[Tensor, "b m"],
        *,
        target_ids: Int[Tensor, "b n"],
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Logits of the token after each of `target_ids`, which are padded at their end or not at all."""
        return self.decoder(target_ids, memory=self.encode(input_ids, key_padding_mask=key_padding_mask))

    def init_cache(
        self,
        input_ids: Int[Tensor, "b m"],
        capacity: int,
        *,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
        cache: AbstractCache | None = None,
    ) -> DecoderCache:
        """Encode, and the decoder's cache before the first of at most `capacity` target tokens."""
        memory = self.encode(input_ids, key_padding_mask=key_padding_mask)
        return self.decoder.init_cache(input_ids.shape[0], capacity, cache=cache, memory=memory)

    def step(self, cache: DecoderCache, target_ids: Int[Tensor, "b n"]) -> tuple[DecoderCache, Float[Tensor, "b n c"]]:
        """Continue the target by n >= 1 tokens, see `Decoder.step`."""
        return self.decoder.step(cache, target_ids)
