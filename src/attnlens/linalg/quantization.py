"""Uniform quantization to 2, 4 or 8 bits: x ~ low + step c, c in {0, .., 2^bits - 1}, codes packed into bytes.

    low = min x,   step = (max x - min x) / (2^bits - 1),   c = round((x - low) / step),

over one axis. Every entry is off by at most step/2 (and round-off), a constant by nothing. `low` and `step` are in
float32 or better.

Source: asymmetric quantization as in "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (Liu, Yuan, Jin,
Zhong, Xu, Braverman, Chen, Hu, 2024), https://arxiv.org/abs/2402.02750.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

BITS = (2, 4, 8)


class Coded(NamedTuple):
    """Packed codes (..., n, ceil(d bits / 8)); low and step, of length 1 along the axis that shares them."""

    codes: Tensor
    low: Tensor
    step: Tensor


def quantize(x: Float[Tensor, "*axes n d"], bits: int, *, axis: int) -> Coded:
    """Codes of `x` with one range along `axis` (-1: an entry's, -2: a channel's)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((x - low) / torch.where(step > 0, step, 1)).round_().clamp_(0, 2**bits - 1)
    return Coded(pack(codes.to(torch.uint8), bits), low, step)


def dequantize(coded: Coded, bits: int, out: Float[Tensor, "*axes n d"]) -> Float[Tensor, "*axes n d"]:
    """Write the numbers that codes stand for into `out`, which is returned."""
    # In place: a fresh tensor as large as the cache costs more than the arithmetic on it.
    return out.copy_(unpack(coded.codes, bits, out.shape[-1])).mul_(coded.step).add_(coded.low)


def output_bound(
    q: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b g m dv"],
    key_slack: Float[Tensor, "b g m d"],
    value_slack: Float[Tensor, "b g m 1"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h n"]:
    """A bound on the Euclidean error of every row of attention whose numbers are off by at most their slack.

    Scores move by at most eta_i = scale max_j sum_c |q_ic| slack_jc; the 1-norm of the change of a softmax is at most
    the largest change of its scores (the mean absolute deviation of numbers within [-eta, eta] is at most eta), and it
    sums to zero: eta_i diam(V) / 2 at most. The values add sqrt(dv) times their largest slack.
    """
    scaled = q.abs() * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows = scaled.unflatten(1, (v.shape[1], -1))
    moved = (rows @ key_slack[:, :, None].mT).amax(-1).flatten(1, 2)
    radius = (v - v.mean(2, keepdim=True)).norm(dim=-1).amax(-1)
    own = v.shape[-1] ** 0.5 * value_slack.amax((2, 3))
    repeats = q.shape[1] // v.shape[1]
    radius, own = (x.repeat_interleave(repeats, 1)[..., None] for x in (radius, own))
    return moved * radius + own


def pack(codes: UInt8[Tensor, "*axes n d"], bits: int) -> UInt8[Tensor, "*axes n bytes"]:
    """Of B bytes, byte j holds the codes j, j + B, ..., the first in its lowest bits; what is missing is zero.

    So pieces of the result are whole runs of bytes under one shift, which a processor reads many at a time.
    """
    each = 8 // bits
    packed, *rest = F.pad(codes, (0, -codes.shape[-1] % each)).chunk(each, -1)
    for place, part in enumerate(rest, 1):
        packed = packed | part << bits * place
    return packed


def unpack(packed: UInt8[Tensor, "*axes n bytes"], bits: int, width: int) -> UInt8[Tensor, "*axes n {width}"]:
    """The codes that `pack` made bytes of."""
    if bits == 8:
        return packed
    parts = [packed >> place & 2**bits - 1 for place in range(0, 8, bits)]
    return torch.cat(parts, -1)[..., :width]
