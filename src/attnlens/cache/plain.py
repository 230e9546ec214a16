"""Keys and values as they came: (d + dv) floats an entry and group, appended in place."""

from typing import NamedTuple, final

from jaxtyping import Float, Int
from torch import Tensor

from attnlens.cache.growing import Growing
from attnlens.cache.store import AbstractStore, gather


class PlainState(NamedTuple):
    """Keys (b, g, m, d) and values (b, g, m, dv) so far."""

    keys: Growing
    values: Growing


@final
class Plain(AbstractStore):
    """Full precision."""

    def init(self, batch: int, num_groups: int, key_dim: int, value_dim: int, *, like: Tensor) -> PlainState:
        keys, values = (Growing.empty(batch, num_groups, width, like=like) for width in (key_dim, value_dim))
        return PlainState(keys, values)

    def length(self, state: PlainState) -> int:
        return state.keys.length

    def entries(self, state: PlainState) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m dv"]]:
        return state.keys.tensor, state.values.tensor

    def extend(
        self, state: PlainState, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n dv"]
    ) -> tuple[PlainState, Float[Tensor, "b g m d"], Float[Tensor, "b g m dv"]]:
        state = PlainState(state.keys.append(k), state.values.append(v))
        return state, state.keys.tensor, state.values.tensor

    def keep(self, state: PlainState, index: Int[Tensor, "b g r"]) -> PlainState:
        return PlainState(*(Growing.of(gather(x.tensor, index)) for x in state))
