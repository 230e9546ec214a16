"""What the models have in common: embed, place, a stack of blocks, a norm, a head."""

from typing import ClassVar, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.models.block import AbstractBlock
from attnlens.position.base import AbstractPosition


class AbstractModel(nn.Module):
    """Token ids to logits; a subclass declares whether a token sees those after it.

    Args:
        embedding: ids to vectors.
        position: places the vectors; one that rotates is shared with the projections.
        blocks: the layers.
        norm: applied before the head.
        head: vectors to logits.
    """

    causal: ClassVar[bool]

    def __init__(
        self,
        embedding: nn.Module,
        position: AbstractPosition,
        blocks: list[AbstractBlock],
        norm: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.embedding, self.position = embedding, position
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = norm, head

    @property
    def operators(self) -> list[AbstractAttention]:
        """The attention operator of each layer."""
        return [block.projection.attention for block in self.layers]

    @property
    def layers(self) -> list[AbstractBlock]:
        """The blocks as what they are, which a ModuleList does not say."""
        return cast(list[AbstractBlock], list(self.blocks))

    def forward(
        self, input_ids: Int[Tensor, "b n"], *, key_padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"] | Float[Tensor, "b c"]:
        """Logits for each token or for the sequence, as the head has it."""
        x = self.position.embed(self.embedding(input_ids))
        for block in self.layers:
            x = block(x, causal=self.causal, key_padding_mask=key_padding_mask)
        return self.head(self.norm(x), key_padding_mask=key_padding_mask)
