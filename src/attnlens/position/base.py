"""What a position encoding is: something added to the embeddings, or a rotation of queries and keys, or neither."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn


class AbstractPosition(nn.Module):
    """Positions of a sequence; a subclass overrides `embed` or `rotate`, whichever it is.

    One object serves the whole model: the model calls `embed` once, and those that declare `rotates` are handed to
    every projection, which calls `rotate`. An object that rotates holds no weights, so sharing it shares nothing
    that training changes.

    Args:
        max_length: the longest sequence it can place, or None if any length will do.

    Declared on the class:
        rotates: whether `rotate` does anything.
        extra_dims: by how much `rotate` widens queries and keys.
        causal_only: whether it has a meaning under a causal mask only.
    """

    rotates: ClassVar[bool] = False
    extra_dims: ClassVar[int] = 0
    causal_only: ClassVar[bool] = False

    def __init__(self, max_length: int | None) -> None:
        super().__init__()
        self.max_length = max_length

    def embed(self, x: Float[Tensor, "b n w"], *, offset: int = 0) -> Float[Tensor, "b n w"]:
        """Embeddings `x` of the tokens offset, ..., offset + n - 1 with their positions in them."""
        return x

    def rotate(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], *, offset: int = 0
    ) -> tuple[Float[Tensor, "b h n d+{self.extra_dims}"], Float[Tensor, "b g n d+{self.extra_dims}"]]:
        """Queries and keys of the tokens offset, ..., offset + n - 1 with their positions in them; g divides h."""
        return q, k

    def check(self, length: int) -> None:
        """Refuse a sequence that is too long.

        Raises:
            ValueError: `length` exceeds `max_length`.
        """
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"`max_length` of {type(self).__name__} is {self.max_length}, got a sequence of {length} tokens; "
                "build the model with a larger `max_length` or cut the sequence"
            )

    def check_causal(self, causal: bool) -> None:
        """Refuse attention that is not causal.

        Raises:
            ValueError: `causal` is False and the positions have a meaning under a causal mask only.
        """
        if self.causal_only and not causal:
            raise ValueError(
                f"`position` {type(self).__name__} needs causal attention, since its bias is linear in the place of "
                "the key: use model=decoder, or position=rope, learned or sinusoidal"
            )
