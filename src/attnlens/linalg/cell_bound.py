"""How far softmax attention moves when sets of keys are replaced by points: a bound for every row, always.

A point c stands for N_c keys, with which row i has scores of mean m_ic and range w_ic; the method weighs it by
e^{a_ic} and gives it the value u_c, a mean of their values with weights whose logarithms range over g_c. Let p_ic be
the exact mass of its keys and r_ic = log of (method's mass / exact mass), both before normalization. By Jensen's
inequality and Hoeffding's lemma

    hi - w_ic^2 / 8 = lo <= r_ic <= hi,   hi = a_ic - (m_ic + log N_c),

and a key that is kept exactly has r = 0. Let R = sum_c p_ic e^{r_ic}. If R <= 1, the total variation between the masses
of the method and the exact ones is sum over those that shrink of p (1 - e^r / R) <= sum p (1 - e^lo)+; if R >= 1, it is
sum over those that grow of p (e^r / R - 1) <= sum p (e^hi - 1)+. It is also at most tanh((max hi - min lo) / 4). So

    |out_i - exact_i| <= min(tanh(..), max(sum_c p (1 - e^lo)+, sum_c p (e^hi - 1)+)) diam(V)
                         + sum_c p_ic tanh((w_ic + g_c) / 4) diam(V_c),

the last term for the values, whose exact weights within the set differ from the method's by a log ratio of range
w + g at most. At a mean key and equal weights hi = 0 and g = 0: mass second order, value first order in w.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.dense import softmax_round_off

LARGEST = 700  # its exponential is finite in float64


class Points(NamedTuple):
    """One disjoint part of the keys as points.

    owner: the point of each key.
    visible: which points a row sees.
    exponent: a_ic.
    weight_range: g_c.
    """

    owner: Int[Tensor, "b h m"]
    visible: Bool[Tensor, "#b #h n c"]
    exponent: Float[Tensor, "b h n c"]
    weight_range: Float[Tensor, "b h c"]


def cell_bound(
    parts: list[Points],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n"]:
    """The bound above for keys kept exactly but for those in `parts`, plus round-off; dense float64: analysis.

    Padded k and v must be zero. Points that a row sees lie wholly among the keys that it may see.
    """
    real = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
    hidden = ~real[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    hidden = hidden | torch.ones_like(hidden).triu(1) if causal else hidden
    scores = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0))
    apart = torch.cdist(v.double(), v.double()).masked_fill(~(real[:, None, :, None] & real[:, None, None]), 0)
    shrunk = grown = of_values = torch.zeros_like(lse[..., 0])
    least = most = shrunk
    for part in parts:
        mass, low, high, width = _log_ratios(part, scores, weights, real)
        shrunk = shrunk + (mass * -torch.expm1(low.clamp_max(0))).sum(-1)
        # Where the exponential overflows a mass may have underflowed: the other bound of the minimum holds alone.
        growth = torch.where(high > LARGEST, torch.inf, mass * torch.expm1(high.clamp(0, LARGEST)))
        grown = grown + growth.sum(-1)
        least, most = torch.minimum(least, low.amin(-1)), torch.maximum(most, high.amax(-1))
        together = part.owner[..., :, None] == part.owner[..., None, :]
        reach = apart.masked_fill(~together, 0).amax(-1)
        diameter = torch.zeros_like(part.weight_range.double()).scatter_reduce(-1, part.owner, reach, "amax")
        turned = torch.tanh((width + part.weight_range[..., None, :]) / 4)
        of_values = of_values + (mass * turned * diameter[..., None, :]).sum(-1)
    moved = torch.minimum(torch.tanh((most - least) / 4), torch.maximum(shrunk, grown))
    bound = moved * apart.amax((-2, -1))[..., None] + of_values
    return (bound + 2 * softmax_round_off(q, k, v)).to(q.dtype)


def _log_ratios(
    part: Points, scores: Float[Tensor, "b h n m"], weights: Float[Tensor, "b h n m"], real: Bool[Tensor, "b m"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact mass, lo, hi and range of scores of every (row, point), zero where the row does not see the point."""
    owner = part.owner[:, :, None].expand(scores.shape)
    shown = real[:, None, None].expand(scores.shape)
    empty = torch.zeros_like(part.exponent.double())
    finite = scores.masked_fill(scores == -torch.inf, 0).masked_fill(~shown, 0)
    count = empty.scatter_add(-1, owner, shown.double())
    mean = empty.scatter_add(-1, owner, finite) / count.clamp_min(1)
    top = (empty - torch.inf).scatter_reduce(-1, owner, scores.masked_fill(~shown, -torch.inf), "amax")
    low = (empty + torch.inf).scatter_reduce(-1, owner, scores.masked_fill(~shown, torch.inf), "amin")
    seen = part.visible & (count > 0)
    width = torch.where(seen, top - low, 0)
    high = torch.where(seen, part.exponent.double() - mean - count.clamp_min(1).log(), 0)
    mass = empty.scatter_add(-1, owner, weights).masked_fill(~seen, 0)
    return mass, high - width.square() / 8, high, width
