"""A tensor that grows along its length, as a value: amortized O(n) for n appended rows in place of a copy of the whole.

Values that share a beginning share a buffer. Only the value that reaches to the end of what is filled may write
behind it; any other one copies first. So two continuations of one prefix never see each other.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils import _pytree as pytree


class _Buffer:
    """Storage that several values share, and how much of it is filled."""

    def __init__(self, data: Tensor, filled: int) -> None:
        self.data, self.filled = data, filled


@final
@dataclass(frozen=True)
class Growing:
    """The first `length` rows of a shared buffer, along the last axis but one.

    Build one with `Growing.empty` or `Growing.of`; read it with `tensor`.
    """

    buffer: _Buffer
    length: int

    @staticmethod
    def empty(*shape: int, like: Tensor, capacity: int = 0) -> "Growing":
        """No rows yet, of shape (..., 0, d) for `shape` = (..., d); room for `capacity` before the first copy."""
        *axes, width = shape
        return Growing(_Buffer(like.new_empty(*axes, capacity, width), 0), 0)

    @staticmethod
    def of(rows: Shaped[Tensor, "*axes n d"]) -> "Growing":
        """The rows of a tensor, which is not copied and must not be changed afterwards."""
        return Growing(_Buffer(rows, rows.shape[-2]), rows.shape[-2])

    @property
    def tensor(self) -> Shaped[Tensor, "*axes n d"]:
        """The rows so far, as a view."""
        return self.buffer.data.narrow(-2, 0, self.length)

    def append(self, rows: Shaped[Tensor, "*axes n d"]) -> "Growing":
        """The value with further rows; `self` stays what it was.

        Where gradients are asked for nothing is written in place, and every append is a copy.
        """
        if torch.is_grad_enabled() and (rows.requires_grad or self.buffer.data.requires_grad):
            return Growing.of(torch.cat([self.tensor, rows], -2))
        length = self.length + rows.shape[-2]
        buffer = self.buffer
        if buffer.filled != self.length or length > buffer.data.shape[-2]:
            buffer = self._copy(max(length, min(2 * self.length, length + 4096)), rows)
        buffer.data.narrow(-2, self.length, rows.shape[-2]).copy_(rows)
        buffer.filled = length
        return Growing(buffer, length)

    def _copy(self, room: int, like: Tensor) -> _Buffer:
        old = self.tensor
        data = like.new_empty(*old.shape[:-2], max(room, self.buffer.data.shape[-2]), old.shape[-1])
        data[..., : self.length, :] = old
        return _Buffer(data, self.length)


# A leaf of a cache like any other for those who map over its tensors (beam search reorders the batch).
pytree.register_pytree_node(
    Growing,
    lambda value: ([value.tensor], None),
    lambda leaves, _: Growing.of(next(iter(leaves))),
)
