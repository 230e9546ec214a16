"""Sums over keys of features that leave the range of floats: every key carries the logarithm of its scale.

A key has features e^{c_j} f(y_j), f of order one. Sums are kept in units of e^{top}, top the largest c so far,

    F_i = sum_{j <= i} e^{c_j - top_i} f(y_j),   top_i = max_{j <= i} c_j,

which is a recurrence with the decay e^{top_{i-1} - top_i} <= 1: a chunked scan. No exponent is positive, and a key that
comes later sets no scale for those before it. A common factor of a query's features cancels in the ratio of sums, so
that queries carry none. Numerator and normalizer are those of attnlens.linalg.signed_features, in the same units.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.linalg.decay import bounded_decay
from attnlens.linalg.signed_features import (
    SignedState,
    Sums,
    all_sums,
    causal_sums,
    empty_signed,
    held_ratio,
    held_rows,
)


class LeveledState(NamedTuple):
    """sum_j e^{c_j - top} f(y_j) [v_j, 1]^T, sum_j e^{2 (c_j - top)} |f(y_j)|^2, sum_j [v_j, 1] over the keys so far,
    and top."""

    moment: Float[Tensor, "b h r dv1"]
    energy: Float[Tensor, "b h"]
    values: Float[Tensor, "b h dv1"]
    top: Float[Tensor, "b h"]


def empty_leveled(batch: int, num_heads: int, num_features: int, value_dim: int, like: Tensor) -> LeveledState:
    """The sums over no key, on the device of `like` and in at least float32."""
    empty = empty_signed(batch, num_heads, num_features, value_dim, like)
    return LeveledState(*empty, torch.full_like(empty.energy, torch.finfo(empty.energy.dtype).min / 4))


def leveled(f: Float[Tensor, "b h n r"]) -> tuple[Float[Tensor, "b h n r"], Float[Tensor, "b h n"]]:
    """f with largest entries of one, and the logarithm of what they were; the scale has no gradient, since whatever
    it is it cancels."""
    scale = f.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(f.dtype).tiny)
    return f / scale, scale.squeeze(-1).log()


def running_levels(
    f_y: Float[Tensor, "b h n r"],
    log_scale: Float[Tensor, "b h n"],
    key_padding_mask: Bool[Tensor, "b n"] | None,
    top: Float[Tensor, "b h"] | None = None,
) -> tuple[Float[Tensor, "b h n r"], Float[Tensor, "b h n"], Float[Tensor, "b h"]]:
    """e^{c_j - top_j} f(y_j), the log decay before every token, and the last top; `top` is that of the past."""
    f_y, log_scale = _real(f_y, log_scale, key_padding_mask)
    before = torch.full_like(log_scale[..., 0], torch.finfo(log_scale.dtype).min / 4) if top is None else top
    tops = torch.cat([before[..., None], log_scale], -1).cummax(-1).values
    decay = bounded_decay(tops[..., :-1] - tops[..., 1:])
    return f_y * (log_scale - tops[..., 1:]).exp()[..., None], decay, tops[..., -1]


def common_level(
    f_y: Float[Tensor, "b h m r"], log_scale: Float[Tensor, "b h m"], key_padding_mask: Bool[Tensor, "b m"] | None
) -> Float[Tensor, "b h m r"]:
    """All keys in units of the largest."""
    f_y, log_scale = _real(f_y, log_scale, key_padding_mask)
    return f_y * (log_scale - log_scale.amax(-1, keepdim=True)).exp()[..., None]


def leveled_sums(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h m r"],
    log_scale: Float[Tensor, "b h m"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
    exact: int = 0,
) -> Sums:
    """The sums of the keys' features e^{log_scale} f_y, each row in units of its own."""
    if not causal:
        return all_sums(f_x, common_level(f_y, log_scale, key_padding_mask), v, key_padding_mask, exact)
    f_y, decay, _ = running_levels(f_y, log_scale, key_padding_mask)
    return causal_sums(f_x, f_y, v, key_padding_mask, log_decay=decay, exact=exact)[1]


def leveled_attention(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h m r"],
    log_scale: Float[Tensor, "b h m"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
    exact: int = 0,
) -> Float[Tensor, "b h n dv"]:
    """`signed_attention` of the keys' features e^{log_scale} f_y."""
    masks = {"causal": causal, "key_padding_mask": key_padding_mask}
    return held_ratio(f_x, leveled_sums(f_x, f_y, log_scale, v, **masks, exact=exact), exact)


def leveled_step(
    past: LeveledState,
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h n r"],
    log_scale: Float[Tensor, "b h n"],
    v: Float[Tensor, "b h n dv"],
    exact: int = 0,
) -> tuple[LeveledState, Float[Tensor, "b h n dv"]]:
    """Continue by n tokens."""
    f_y, decay, top = running_levels(f_y, log_scale, None, past.top)
    before = SignedState(past.moment, past.energy, past.values)
    after, sums = causal_sums(f_x, f_y, v, log_decay=decay, past=before, final_state=True, exact=exact)
    assert after is not None
    return LeveledState(*after, top), held_ratio(f_x, sums, exact)


def held_leveled(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h m r"],
    log_scale: Float[Tensor, "b h m"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
    exact: int = 0,
) -> Bool[Tensor, "b h n"]:
    """Which rows are divided by their noise in place of their sum."""
    masks = {"causal": causal, "key_padding_mask": key_padding_mask}
    return held_rows(f_x, leveled_sums(f_x, f_y, log_scale, f_y[..., :1], **masks, exact=exact), exact)


def _real(f_y: Tensor, log_scale: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Padding without features and without a say in the scale."""
    if key_padding_mask is None:
        return f_y, log_scale
    real = key_padding_mask[:, None]
    least = torch.finfo(log_scale.dtype).min / 4
    return torch.where(real[..., None], f_y, 0), torch.where(real, log_scale, least)
