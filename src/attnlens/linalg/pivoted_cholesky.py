"""Randomly pivoted Cholesky of H = exp(x x^T): a few points whose columns explain most of the trace.

With S the points taken so far, the next is drawn with the probability of its share of the diagonal of

    H - H_:S H_SS^{-1} H_S:,

which a partial Cholesky factor gives in O(m (d + t)) for step t: O(m r (d + r)) in all, O(m r) memory. The factor is
that of the Gaussian kernel G, H_jl = e^{|x_j|^2 / 2} G_jl e^{|x_l|^2 / 2}, whose diagonal is one; residuals differ by
the factor e^{|x_j|^2}, kept as a weight of the draw.

A pivot is drawn by inversion of one uniform number a step: the law of a Gumbel maximum, without its r x m noise.

Source: "Randomly pivoted Cholesky: Practical approximation of a kernel matrix with few entry evaluations" (Chen,
Epperly, Tropp, Webber, 2025), https://arxiv.org/abs/2207.06503.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.blocks import take_rows


@torch.no_grad()
def random_pivots(
    x: Float[Tensor, "b h m d"], uniform: Float[Tensor, "h r"], real: Bool[Tensor, "#b m"]
) -> tuple[Int[Tensor, "b h r"], Bool[Tensor, "b h r"]]:
    """r pivots among the real points from r uniform numbers in [0, 1) a head, and which of the r places are filled:
    fewer points than places, or points that the others reproduce up to round-off, leave some empty."""
    half = x.square().sum(-1) / 2
    # Exponents are differences of these halves, so is their round-off: a repeated point must not pass for a new one.
    floor = torch.finfo(x.dtype).eps * (1000 + 16 * half.amax(-1, keepdim=True))
    weight = (2 * half - 2 * half.amax(-1, keepdim=True)).exp().clamp_min(1e-30)
    left = real[:, None].expand(half.shape).to(x.dtype)
    factor = x.new_zeros(*x.shape[:2], uniform.shape[1], x.shape[2])
    pivots, filled = [], []
    for t in range(uniform.shape[1]):
        mass = (left * weight).cumsum(-1)
        target = uniform[:, t, None].to(x.dtype) * mass[..., -1:]
        pivot = torch.searchsorted(mass, target, right=True).clamp_max(x.shape[2] - 1)
        size = left.gather(-1, pivot)
        column = (take_rows(x, pivot) @ x.mT)[:, :, 0] - half - half.gather(-1, pivot)
        known = factor[:, :, :t].gather(-1, pivot[:, :, None].expand(-1, -1, t, -1))
        column = column.clamp_max(0).exp() - (known.mT @ factor[:, :, :t])[:, :, 0]
        column = torch.where(size > 0, column * size.maximum(floor).rsqrt(), 0)
        factor[:, :, t] = column
        left = (left - column.square()).scatter(-1, pivot, 0)
        left = torch.where(left > floor, left, 0)
        pivots.append(pivot)
        filled.append(size > 0)
    return torch.cat(pivots, -1), torch.cat(filled, -1)
