"""One layer of a Transformer: attention, maybe attention to a memory, maybe a network on each token; each with a
residual and norms."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, final

from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.cache.base import AbstractCache
from attnlens.projection.base import AbstractProjection


class Memory(NamedTuple):
    """What a layer attends to beside its own tokens.

    tokens: (b, m, w), the output of an encoder.
    mask: (b, m), True for a real token, or None.
    """

    tokens: Tensor
    mask: Tensor | None = None


class BlockCache(NamedTuple):
    """Of the attention to the tokens so far, and what is remembered of the memory (None without one)."""

    own: Any
    remembered: Any
    mask: Tensor | None


class AbstractBlock(nn.Module):
    """The parts of a layer, in their order; a subclass says where the norms stand.

    Args:
        projection: attention among the tokens.
        mlp: a network on each token, or None.
        norms: `norms_per_part` for each part that there is.
        cross: attention from the tokens to a memory, or None.
        dropout: probability with which an entry of a part's output is dropped in training.

    Declared on the class:
        norms_per_part: how many norms each part has.
        normalized: whether the output has gone through a norm, so that the model needs none at its end.

    Raises:
        ValueError: a number of norms that does not fit the parts.
    """

    norms_per_part: ClassVar[int] = 1
    normalized: ClassVar[bool] = False

    def __init__(
        self,
        projection: AbstractProjection,
        mlp: nn.Module | None,
        norms: list[nn.Module],
        *,
        cross: AbstractProjection | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        expected = self.norms_per_part * (1 + (cross is not None) + (mlp is not None))
        if len(norms) != expected:
            raise ValueError(f"`norms` must be {expected} for these parts of {type(self).__name__}, got {len(norms)}")
        self.projection, self.cross, self.mlp = projection, cross, mlp
        self.norms = nn.ModuleList(norms)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b n"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, "b n w"]:
        y = self.projection(self.before(0, x), causal=causal, key_padding_mask=key_padding_mask)
        x = self.after(0, x, self.dropout(y))
        if self.cross is not None:
            assert memory is not None, "the model hands the memory to every layer that has a part for it"
            y = self.cross(self.before(1, x), memory=memory.tokens, key_padding_mask=memory.mask)
            x = self.after(1, x, self.dropout(y))
        return self._finish(x)

    def init_cache(
        self, batch: int, capacity: int, cache: AbstractCache | None = None, memory: Memory | None = None
    ) -> BlockCache:
        """The cache before the first of at most `capacity` tokens, see `AbstractProjection.init_cache`."""
        own = self.projection.init_cache(batch, capacity, cache)
        if self.cross is None or memory is None:
            return BlockCache(own, None, None)
        return BlockCache(own, self.cross.remember(memory.tokens, key_padding_mask=memory.mask), memory.mask)

    def step(self, cache: BlockCache, x: Float[Tensor, "b n w"]) -> tuple[BlockCache, Float[Tensor, "b n w"]]:
        """Continue a causal run by n tokens, see `AbstractProjection.step`."""
        own, y = self.projection.step(cache.own, self.before(0, x))
        x = self.after(0, x, self.dropout(y))
        if self.cross is not None:
            y = self.cross.recall(cache.remembered, self.before(1, x), cache.mask)
            x = self.after(1, x, self.dropout(y))
        return BlockCache(own, cache.remembered, cache.mask), self._finish(x)

    def _finish(self, x: Tensor) -> Tensor:
        if self.mlp is None:
            return x
        part = 1 if self.cross is None else 2
        return self.after(part, x, self.dropout(self.mlp(self.before(part, x))))

    @abstractmethod
    def before(self, part: int, x: Tensor) -> Tensor:
        """What a part reads: part 0 is attention, then come attention to the memory and the network, as there are."""

    @abstractmethod
    def after(self, part: int, x: Tensor, y: Tensor) -> Tensor:
        """What becomes of the input x and the output y of a part."""


@final
class PreNorm(AbstractBlock):
    """x + f(norm(x)): trains without care for the learning rate; the model ends with one more norm.

    Reference: "On layer normalization in the Transformer architecture", Xiong et al., 2020.
    """

    def before(self, part: int, x: Tensor) -> Tensor:
        return self.norms[part](x)

    def after(self, part: int, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@final
class PostNorm(AbstractBlock):
    """norm(x + f(x)): the original order, which needs a warm-up.

    Reference: "Attention is all you need", Vaswani et al., 2017.
    """

    normalized: ClassVar[bool] = True

    def before(self, part: int, x: Tensor) -> Tensor:
        return x

    def after(self, part: int, x: Tensor, y: Tensor) -> Tensor:
        return self.norms[part](x + y)


@final
class PeriNorm(AbstractBlock):
    """x + norm(f(norm(x))): what a part adds has a size of its own, so that the residual grows at most linearly.

    Reference: "Peri-LN: revisiting normalization layer in the Transformer architecture", Kim et al., 2025,
    https://arxiv.org/abs/2502.02732.
    """

    norms_per_part: ClassVar[int] = 2

    def before(self, part: int, x: Tensor) -> Tensor:
        return self.norms[2 * part](x)

    def after(self, part: int, x: Tensor, y: Tensor) -> Tensor:
        return x + self.norms[2 * part + 1](y)
