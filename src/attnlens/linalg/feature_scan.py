"""Causal attention with positive features given by their logarithms, chunk by chunk in the linear domain.

For log features a_i, b_j in R^m and values v_j,

    out_i = sum_{j <= i} sum_f e^{a_if + b_jf} v_j / sum_{j <= i} sum_f e^{a_if + b_jf}.

A chunk needs two exponentials a token and feature and five products, against twice as many of both in the log domain,
but floating point has to hold e^{b_jf} as it is: its scale is never shared, since a scale that later keys decide would
let them push earlier ones out of range. e^{a_if} may be scaled by token, which cancels. With t_i = max_f a_if - min_f
a_if and s_j = max_f b_jf every weight of a pair is at least e^{s_j - t_i} after that scaling, and what underflows in it
at most m e^{-c}, c the logarithm of the range: nothing is lost where max t - min s stays well below c, and
`num_in_range` asks for .65 c. In float32 c = 88; Gaussian queries and keys at d = 64 have 28 at logits of standard
deviation 1, 52 at 3, and at 10 122, which leaves the range.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.linalg.prefix import normalized


class FeatureSums(NamedTuple):
    """Sums over the keys so far: of features times values, and of features."""

    moment: Float[Tensor, "bh m dv"]
    mass: Float[Tensor, "bh m"]


class Extremes(NamedTuple):
    """Of the tokens so far, over all heads: the largest t_i, and the smallest and the largest s_j."""

    spread: Tensor
    low: Tensor
    high: Tensor


def num_in_range(
    log_x: Float[Tensor, "bh n m"],
    log_y: Float[Tensor, "bh n m"],
    real: Bool[Tensor, "bh n"] | None,
    before: Extremes | None,
) -> tuple[int, Extremes]:
    """How many of these tokens, from the first on, the linear domain holds, and the extremes after the last of all.

    It reads values on the host. A token counts by itself and what came before it, never by what follows. One with a
    NaN is not in range.
    """
    top, (least, most) = log_y.detach().amax(-1), log_x.detach().aminmax(dim=-1)
    low, high = (top, top) if real is None else (top.masked_fill(~real, math.inf), top.masked_fill(~real, -math.inf))
    spread, low, high = (most - least).amax(0), low.amin(0), high.amax(0)
    if before is not None:
        spread, low, high = spread.clamp_min(before.spread), low.clamp_max(before.low), high.clamp_min(before.high)
    spread, low, high = spread.cummax(0).values, low.cummin(0).values, high.cummax(0).values
    capacity = math.log(torch.finfo(log_x.dtype).max)
    held = ((spread - low).clamp_min(spread) <= 0.65 * capacity) & (high <= 0.55 * capacity)
    return int(held.cumprod(0).sum()), Extremes(spread[-1], low[-1], high[-1])


def linear_chunk(
    log_x: Float[Tensor, "bh n m"],
    log_y: Float[Tensor, "bh n m"],
    v: Float[Tensor, "bh n dv"],
    real: Bool[Tensor, "bh n"] | None,
    past: FeatureSums | None,
) -> tuple[Float[Tensor, "bh n dv"], FeatureSums]:
    """The outputs of consecutive tokens over the keys up to their own and those in `past`, and the sums after them."""
    f_x = torch.exp(log_x - log_x.detach().amax(-1, keepdim=True))
    f_y = log_y.exp() if real is None else torch.where(real[..., None], log_y.exp(), 0)
    weights = torch.bmm(f_x, f_y.mT).tril()
    mass = weights.sum(-1)
    if past is None:
        after = FeatureSums(torch.bmm(f_y.mT, v), f_y.sum(-2))
        return normalized(torch.bmm(weights, v), mass), after
    mass = mass + torch.bmm(f_x, past.mass[..., None]).squeeze(-1)
    total = torch.bmm(f_x, past.moment).baddbmm_(weights, v)
    after = FeatureSums(torch.baddbmm(past.moment, f_y.mT, v), past.mass + f_y.sum(-2))
    return normalized(total, mass), after
