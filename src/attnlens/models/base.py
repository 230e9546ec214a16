"""What the models have in common: embed, place, a stack of blocks, a norm, a head."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.models.block import AbstractBlock, Memory
from attnlens.position.base import AbstractPosition


class Parts(NamedTuple):
    """The arguments of an `AbstractStack`."""

    embedding: nn.Module
    position: AbstractPosition
    blocks: list[AbstractBlock]
    norm: nn.Module
    head: nn.Module
    embedding_norm: nn.Module | None


class AbstractKit(ABC):
    """What a model is assembled from: parts that a config describes, built on demand."""

    @abstractmethod
    def parts(self) -> Parts:
        """Those of the one stack of an encoder or a decoder."""

    @abstractmethod
    def source_parts(self) -> Parts:
        """Those of the encoder of a pair, whose head leaves vectors as they are."""

    @abstractmethod
    def target_parts(self) -> Parts:
        """Those of the decoder of a pair, whose blocks attend to a memory."""


class AbstractModel(nn.Module):
    """Token ids to logits; a subclass declares whether a token sees those after it."""

    causal: ClassVar[bool]

    @classmethod
    @abstractmethod
    def assemble(cls, kit: AbstractKit) -> "AbstractModel":
        """The model from parts that are drawn from the kit, in an order that fixes the initial weights."""

    @property
    @abstractmethod
    def layers(self) -> list[AbstractBlock]:
        """All blocks, in the order in which they run."""

    @property
    def operators(self) -> list[AbstractAttention]:
        """The attention operator of each layer."""
        return [block.projection.attention for block in self.layers]


class AbstractStack(AbstractModel):
    """A model of one stack of blocks.

    Args:
        embedding: ids to vectors.
        position: places the vectors; one that rotates is shared with the projections.
        blocks: the layers.
        norm: applied before the head.
        head: vectors to logits.
        embedding_norm: applied to the placed embeddings, or None.
    """

    def __init__(
        self,
        embedding: nn.Module,
        position: AbstractPosition,
        blocks: list[AbstractBlock],
        norm: nn.Module,
        head: nn.Module,
        embedding_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embedding, self.position, self.embedding_norm = embedding, position, embedding_norm
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = norm, head

    @classmethod
    def assemble(cls, kit: AbstractKit) -> "AbstractModel":
        return cls(*kit.parts())

    @property
    def layers(self) -> list[AbstractBlock]:
        """The blocks as what they are, which a ModuleList does not say."""
        return cast(list[AbstractBlock], list(self.blocks))

    def embed(self, input_ids: Int[Tensor, "b n"], *, offset: int = 0) -> Float[Tensor, "b n w"]:
        """What the first block reads, of the tokens offset, ..., offset + n - 1."""
        x = self.position.embed(self.embedding(input_ids), offset=offset)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        *,
        key_padding_mask: Bool[Tensor, "b n"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, "b n c"] | Float[Tensor, "b c"]:
        """Logits for each token or for the sequence, as the head has it."""
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x, causal=self.causal, key_padding_mask=key_padding_mask, memory=memory)
        return self.finish(x, key_padding_mask=key_padding_mask)

    def finish(
        self, x: Float[Tensor, "b n w"], *, key_padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"] | Float[Tensor, "b c"]:
        """What comes behind the last block: the norm and the head."""
        return self.head(self.norm(x), key_padding_mask=key_padding_mask)
