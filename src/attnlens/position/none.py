"""No positions: order enters through a causal mask or a short convolution, or not at all."""

from typing import final

from attnlens.position.base import AbstractPosition


@final
class NoPosition(AbstractPosition):
    """Tokens are a set; any length will do."""

    def __init__(self) -> None:
        super().__init__(max_length=None)
