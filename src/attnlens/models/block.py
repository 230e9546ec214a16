"""One layer of a Transformer: attention, then (maybe) a network on each token, each with a residual and a norm."""

from typing import ClassVar, final

from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.projection.base import AbstractProjection


class AbstractBlock(nn.Module):
    """The parts of a layer; a subclass says where the norms stand.

    Args:
        projection: attention with its projections.
        mlp: a network on each token, or None.
        norms: one for each part that there is.
        dropout: probability with which an entry of a part's output is dropped in training.

    Declared on the class:
        normalized: whether the output has gone through a norm, so that the model needs none at its end.
    """

    normalized: ClassVar[bool] = False

    def __init__(
        self, projection: AbstractProjection, mlp: nn.Module | None, norms: list[nn.Module], *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.projection, self.mlp = projection, mlp
        self.norms = nn.ModuleList(norms)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        attended = self.projection(self.before(0, x), causal=causal, key_padding_mask=key_padding_mask)
        return self._finish(self.after(0, x + self.dropout(attended)))

    def step(self, cache: tuple, x: Float[Tensor, "b n w"]) -> tuple[tuple, Float[Tensor, "b n w"]]:
        """Continue a causal run by n tokens, see `AbstractProjection.step`."""
        cache, attended = self.projection.step(cache, self.before(0, x))
        return cache, self._finish(self.after(0, x + self.dropout(attended)))

    def _finish(self, x: Tensor) -> Tensor:
        if self.mlp is None:
            return x
        return self.after(1, x + self.dropout(self.mlp(self.before(1, x))))

    def before(self, part: int, x: Tensor) -> Tensor:
        """What part 0 (attention) or 1 (the network) reads."""
        return x

    def after(self, part: int, x: Tensor) -> Tensor:
        """What becomes of the sum of input and output of a part."""
        return x


@final
class PreNorm(AbstractBlock):
    """x + f(norm(x)): trains without care for the learning rate; the model ends with one more norm.

    Reference: "On layer normalization in the Transformer architecture", Xiong et al., 2020.
    """

    def before(self, part: int, x: Tensor) -> Tensor:
        return self.norms[part](x)


@final
class PostNorm(AbstractBlock):
    """norm(x + f(x)): the original order, which needs a warm-up.

    Reference: "Attention is all you need", Vaswani et al., 2017.
    """

    normalized: ClassVar[bool] = True

    def after(self, part: int, x: Tensor) -> Tensor:
        return self.norms[part](x)
