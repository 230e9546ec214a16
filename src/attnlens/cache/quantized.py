"""Keys and values in 2, 4 or 8 bits: keys per channel in groups of tokens, values per token, the newest in full.

Keys have channels that are large in every token, values do not; so a key channel shares its range with the `group`
tokens beside it, a value with the other channels of its token. The newest tokens stay in full precision: as soon as
residual + group of them have gathered, the oldest `group` are written down in codes, once and for all. An entry and
key/value group takes

    ceil(d bits / 8) + ceil(dv bits / 8) + 2 s + 2 d s / group   bytes,   s = 4 (8 in float64),

and (d + dv) floats while it is new. O(m d) a step for reading codes.

Guarantee: every remembered number is off by at most half the step of its range, which bounds the outputs
(`quantization.output_bound`). With 8 bits that is 1/510 of a range; no number of bits makes it zero.

Eviction: a token that goes takes its codes along. The ranges of a group of keys stay until the last of its tokens has
gone, and tokens then carry the number of their group (4 bytes).

Source: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu,
2024), https://arxiv.org/abs/2402.02750. Departures: values are written down along with their keys, not one token a
step; a value's range is that of all its channels, not of 32 of them; ranges are float32.
"""

from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attnlens.cache.growing import Growing
from attnlens.cache.store import AbstractStore, gather
from attnlens.linalg.quantization import BITS, Coded, dequantize, quantize


class QuantizedState(NamedTuple):
    """Old entries in codes, new ones as they came.

    key_codes, value_codes: (b, g, old, bytes).
    key_low, key_step: (b, g, groups, d).
    value_range: (b, g, old, 2), low and step.
    group_of: (b, g, old, 1), the group that an old key is in; None while they are all full, in order.
    keys, values: (b, g, new, d) and (b, g, new, dv).
    """

    key_codes: Growing
    key_low: Growing
    key_step: Growing
    value_codes: Growing
    value_range: Growing
    group_of: Growing | None
    keys: Tensor
    values: Tensor


@final
class Quantized(AbstractStore):
    """Codes for all but the newest entries.

    Args:
        bits: 2, 4 or 8.
        group: tokens whose keys share the range of a channel, at least 1.
        residual: newest tokens in full precision at least, at least 1; at most residual + group - 1 are.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, bits: int, group: int = 32, residual: int = 32) -> None:
        if bits not in BITS:
            raise ValueError(f"`bits` must be 2, 4 or 8, got {bits}; 16 bits and more are the store `Plain`")
        if group < 1:
            raise ValueError(f"`group` must be at least 1, got {group}")
        if residual < 1:
            raise ValueError(f"`residual` must be at least 1 (the newest token is exact), got {residual}")
        self.bits, self.group, self.residual = bits, group, residual
        self.newest = residual + group - 1

    def init(self, batch: int, num_groups: int, key_dim: int, value_dim: int, *, like: Tensor) -> QuantizedState:
        keys, values = (like.new_empty(batch, num_groups, 0, width) for width in (key_dim, value_dim))
        wide = torch.promote_types(like.dtype, torch.float32)
        bytes_ = [-(-width * self.bits // 8) for width in (key_dim, value_dim)]

        def column(width: int, dtype: torch.dtype) -> Growing:
            return Growing.empty(batch, num_groups, width, like=like.new_empty(0, dtype=dtype))

        return QuantizedState(
            key_codes=column(bytes_[0], torch.uint8),
            key_low=column(key_dim, wide),
            key_step=column(key_dim, wide),
            value_codes=column(bytes_[1], torch.uint8),
            value_range=column(2, wide),
            group_of=None,
            keys=keys,
            values=values,
        )

    def length(self, state: QuantizedState) -> int:
        return state.key_codes.length + state.keys.shape[2]

    def entries(self, state: QuantizedState) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m dv"]]:
        return self._read(state, state.keys, state.values)

    def extend(
        self, state: QuantizedState, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n dv"]
    ) -> tuple[QuantizedState, Float[Tensor, "b g m d"], Float[Tensor, "b g m dv"]]:
        new = [torch.cat([old, x], 2) for old, x in ((state.keys, k), (state.values, v))]
        keys, values = self._read(state, *new)
        count = (new[0].shape[2] - self.residual) // self.group * self.group
        if count > 0:
            state = self._write(state, new[0][:, :, :count], new[1][:, :, :count])
            new = [x[:, :, count:].clone() for x in new]
        return state._replace(keys=new[0], values=new[1]), keys, values

    def keep(self, state: QuantizedState, index: Int[Tensor, "b g r"]) -> QuantizedState:
        old = index[..., : index.shape[-1] - state.keys.shape[2]]
        groups = old // self.group if state.group_of is None else state.group_of.tensor[..., 0].gather(2, old)
        # Entries are in order, so are their groups: a new one begins where the number changes.
        place = torch.zeros_like(groups)
        place[..., 1:] = (groups[..., 1:] != groups[..., :-1]).cumsum(-1)
        live = groups.new_zeros(*groups.shape[:2], int(place.max()) + 1 if place.numel() else 0)
        live = live.scatter(2, place, groups)
        kept = {name: Growing.of(gather(getattr(state, name).tensor, live)) for name in ("key_low", "key_step")}
        for name in ("key_codes", "value_codes", "value_range"):
            kept[name] = Growing.of(gather(getattr(state, name).tensor, old))
        return state._replace(**kept, group_of=Growing.of(place[..., None].int()))

    def slack(self, state: QuantizedState) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m 1"]]:
        """Half a step for every remembered key and, one an entry, value: what they may be off by."""
        old, new = state.key_codes.length, state.keys.shape[2]
        groups = torch.arange(old, device=state.keys.device).expand(*state.keys.shape[:2], -1) // self.group
        groups = groups if state.group_of is None else state.group_of.tensor[..., 0].long()
        keys, values = gather(state.key_step.tensor, groups) / 2, state.value_range.tensor[..., 1:] / 2
        return F.pad(keys, (0, 0, 0, new)), F.pad(values, (0, 0, 0, new))

    def _write(self, state: QuantizedState, k: Tensor, v: Tensor) -> QuantizedState:
        """The state with further codes, for whole groups."""
        keys = quantize(k.unflatten(2, (-1, self.group)), self.bits, axis=-2)
        values = quantize(v, self.bits, axis=-1)
        low, step = keys.low.squeeze(-2), keys.step.squeeze(-2)
        group_of = state.group_of
        if group_of is not None:
            numbers = torch.arange(k.shape[2], device=k.device, dtype=torch.int32) // self.group + state.key_low.length
            group_of = group_of.append(numbers[:, None].expand(*k.shape[:3], 1))
        return state._replace(
            key_codes=state.key_codes.append(keys.codes.flatten(2, 3)),
            key_low=state.key_low.append(low),
            key_step=state.key_step.append(step),
            value_codes=state.value_codes.append(values.codes),
            value_range=state.value_range.append(torch.cat([values.low, values.step], -1)),
            group_of=group_of,
        )

    def _read(self, state: QuantizedState, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the codes with the new ones behind them, in the dtype of those."""
        old, wide = state.key_codes.length, state.key_low.tensor.dtype
        both = []
        for new in (new_keys, new_values):
            whole = new.new_empty(*new.shape[:2], old + new.shape[2], new.shape[3], dtype=wide)
            whole[:, :, old:] = new
            both.append(whole)
        keys, values = (whole[:, :, :old] for whole in both)
        codes, ranges = state.key_codes.tensor, (state.key_low.tensor, state.key_step.tensor)
        if state.group_of is None:
            # One range for a group of rows, which is not written out for each.
            keys, codes = (x.unflatten(2, (-1, self.group)) for x in (keys, codes))
            ranges = [x[..., None, :] for x in ranges]
        else:
            ranges = [gather(x, state.group_of.tensor[..., 0].long()) for x in ranges]
        dequantize(Coded(codes, *ranges), self.bits, keys)
        dequantize(Coded(state.value_codes.tensor, *state.value_range.tensor.split(1, -1)), self.bits, values)
        return both[0].to(new_keys.dtype), both[1].to(new_values.dtype)
