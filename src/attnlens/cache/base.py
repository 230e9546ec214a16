"""What a cache policy is: which keys and values of the past decoding keeps, and how it attends to them."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree


class AbstractCache(ABC):
    """A policy, which has no state; the state is a value (a NamedTuple of tensors) that is passed along.

    It serves exact softmax attention: with a policy that keeps everything the outputs are exact, with any other they
    are those of the keys it has kept. Keys arrive with their positions in them.
    """

    @abstractmethod
    def init(self, batch: int, num_groups: int, key_dim: int, value_dim: int, *, capacity: int, like: Tensor) -> tuple:
        """The state before the first of at most `capacity` tokens, with the device and dtype of `like`."""

    @abstractmethod
    def step(
        self,
        state: Any,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        v: Float[Tensor, "b g n dv"],
    ) -> tuple[Any, Float[Tensor, "b h n dv"]]:
        """Continue by n >= 1 tokens: the new state and their outputs.

        Query head i reads key/value group i // (h/g); the queries of this call see its own keys causally, also those
        that the policy then drops.
        """

    def num_bytes(self, state: Any) -> int:
        """Bytes of all tensors of a state, rows that are reserved and not yet filled left out."""
        leaves = pytree.tree_leaves(state)
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
