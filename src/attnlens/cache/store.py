"""What a store is: how the keys and values that a policy keeps are written down."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class AbstractStore(ABC):
    """A way of storing entries, without state; the state is a value (a NamedTuple of tensors) that is passed along.

    newest: so many entries at the end, at most, are in full precision and cannot be dropped by `keep`.
    """

    newest: int = 0

    @abstractmethod
    def init(self, batch: int, num_groups: int, key_dim: int, value_dim: int, *, like: Tensor) -> Any:
        """No entries yet, with the device and dtype of `like`."""

    @abstractmethod
    def length(self, state: Any) -> int:
        """Entries of every row and group."""

    @abstractmethod
    def entries(self, state: Any) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m dv"]]:
        """The keys and values as they are remembered, in order of their tokens."""

    @abstractmethod
    def extend(
        self, state: Any, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n dv"]
    ) -> tuple[Any, Float[Tensor, "b g m d"], Float[Tensor, "b g m dv"]]:
        """The state with further entries, and all of them as the call that brings these sees them: those exact."""

    @abstractmethod
    def keep(self, state: Any, index: Int[Tensor, "b g r"]) -> Any:
        """The state with the entries of `index` alone, which ascends and has the `newest` ones at its end."""


def gather(x: Shaped[Tensor, "b g m d"], index: Int[Tensor, "b g r"]) -> Shaped[Tensor, "b g r d"]:
    """Rows of every group by their places."""
    # Whole rows are copied; `Tensor.gather` takes four times as long, number by number.
    start = x.shape[2] * torch.arange(x.shape[0] * x.shape[1], device=x.device).view(*x.shape[:2], 1)
    return x.reshape(-1, x.shape[-1]).index_select(0, (start + index).flatten()).view(*index.shape, x.shape[-1])
