"""What policies that drop entries share: attend to all there is, choose what stays, tell the store.

Every batch row and key/value group drops entries of its own; all keep equally many. Entries stay in order of their
tokens.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from attnlens.cache.base import AbstractCache
from attnlens.cache.plain import Plain
from attnlens.cache.store import AbstractStore, gather


class Evicted(NamedTuple):
    """The state of the store, and what the policy remembers of the entries in it."""

    stored: Any
    memory: Any


class AbstractEviction(AbstractCache):
    """A policy of which entries a store keeps.

    Args:
        store: how entries are written down; `Plain` where None.
        recent: newest entries that the policy never drops; None where it drops nothing that is stored.
        name: of the argument that `recent` comes from.

    Raises:
        ValueError: the store cannot drop some entries that the policy may want to drop.
    """

    def __init__(self, store: AbstractStore | None, *, recent: int | None, name: str) -> None:
        self.store = store or Plain()
        if recent is not None and self.store.newest > recent:
            raise ValueError(
                f"`store` cannot drop the newest {self.store.newest} entries, which it holds in full precision, but "
                f"`{name}` protects {recent}: raise `{name}`, or lower `residual` or `group` of the store"
            )

    @abstractmethod
    def begin(self, batch: int, num_groups: int, like: Tensor) -> Any:
        """What the policy remembers before the first entry."""

    @abstractmethod
    def choose(
        self,
        memory: Any,
        q: Float[Tensor, "b h n d"],
        keys: Float[Tensor, "b g m d"],
        values: Float[Tensor, "b g m dv"],
    ) -> tuple[Float[Tensor, "b h n dv"], Any, Int[Tensor, "b g r"] | None]:
        """The outputs of the last n of m tokens; then the memory and the entries that stay (None: all)."""

    def init(
        self, batch: int, num_groups: int, key_dim: int, value_dim: int, *, capacity: int, like: Tensor
    ) -> Evicted:
        stored = self.store.init(batch, num_groups, key_dim, value_dim, like=like)
        return Evicted(stored, self.begin(batch, num_groups, like))

    def step(
        self,
        state: Evicted,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        v: Float[Tensor, "b g n dv"],
    ) -> tuple[Evicted, Float[Tensor, "b h n dv"]]:
        stored = state.stored
        if self.store.length(stored) == 0:
            out, memory, index = self.choose(state.memory, q, k, v)
            # What a prefill drops is never stored.
            k, v = (x if index is None else gather(x, index) for x in (k, v))
            return Evicted(self.store.extend(stored, k, v)[0], memory), out
        stored, keys, values = self.store.extend(stored, k, v)
        out, memory, index = self.choose(state.memory, q, keys, values)
        return Evicted(stored if index is None else self.store.keep(stored, index), memory), out
