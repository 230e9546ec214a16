"""Hybrid random features: positive and trigonometric features of the softmax kernel, mixed by the angle of the pair.

    SM_+ = e^{-(|x|^2 + |y|^2)/2} mean_f e^{<w_f, x + y>},   SM_trig = e^{(|x|^2 + |y|^2)/2} mean_f cos <w_f, x - y>,
    L = 1/2 - (1/2k) sum_r sgn <u_r, x> sgn <u_r, y>,   E L = theta/pi =: lambda,   w_f, u_r ~ N(0, I) independent,
    estimate = L SM_+ + (1 - L) SM_trig,

theta the angle of x and y, m frequencies w_f shared by both, k planes u_r. SM_+ is exact at x = -y, SM_trig at x = y,
and the weights follow. L is the share of planes that separate x from y, so that the estimate is an inner product of
6 m k features: those of SM_trig count for the planes that have x and y on one side, those of SM_+ for the others.
Written with products of signs, 1/2 - <psi(x), psi(y)>/2, it would take 3 m (1 + k) and cancel where L is 0 or 1: in
float32 nothing would be left of SM_+ beside an e^16 times larger SM_trig.

Both are unbiased given L, so the estimate is unbiased whatever L, and its variance has no term from the mean: with
s = |x + y|^2, z = |x - y|^2 and SM = e^{<x, y>},

    m Var = E L^2 V_+ + E (1 - L)^2 V_trig + 2 E L (1 - L) C,
    V_+ = SM^2 (e^s - 1),   V_trig = SM^{-2} e^s (1 - e^{-z})^2/2,   C = SM^2 (cos(|x|^2 - |y|^2) - 1) <= 0,
    E L^2 = lambda^2 + l,   E (1 - L)^2 = (1 - lambda)^2 + l,   E L (1 - L) = lambda (1 - lambda) - l,
    l = lambda (1 - lambda)/k.

C is the covariance of e^{<w, x + y>} and cos <w, x - y>, scaled: separate frequencies would have 0 in its place. At
k = 1, where L is 0 or 1, this is lambda V_+ + (1 - lambda) V_trig; with lambda known, k infinite, lambda^2 V_+ +
(1 - lambda)^2 V_trig + 2 lambda (1 - lambda) C. The error falls like m^{-1/2} for every k. At theta = 0 and pi the
estimate has no error if |x| = |y|.

Source: "Hybrid Random Features" (Choromanski et al., 2022), https://arxiv.org/abs/2110.04367. The variance for shared
frequencies is derived here.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class LeveledFeatures(NamedTuple):
    """Features e^{log_scale} values of every token."""

    values: Float[Tensor, "b h n r"]
    log_scale: Float[Tensor, "b h n"]


def plane_sides(x: Float[Tensor, "*batch n d"], planes: Float[Tensor, "*batch k d"]) -> Float[Tensor, "*batch n k 2"]:
    """k^{-1/2} at the side of each plane on which x is, zero at the other; without gradient."""
    positive = (x.detach() @ planes.mT >= 0).to(x.dtype)
    return torch.stack([positive, 1 - positive], -1) * planes.shape[-2] ** -0.5


def hybrid_features(
    x: Float[Tensor, "b h n d"],
    projections: Float[Tensor, "b h m d"],
    planes: Float[Tensor, "b h k d"],
    *,
    keys: bool,
) -> LeveledFeatures:
    """The positive features, for every plane at the own side (keys) or the other one (queries), and the trigonometric
    ones at the own side."""
    angle, half = x @ projections.mT, x.square().sum(-1, keepdim=True) / 2
    log_positive = angle - half
    log_scale = log_positive.detach().amax(-1, keepdim=True).maximum(half.detach())
    positive = (log_positive - log_scale).exp()
    trigonometric = torch.cat([angle.sin(), angle.cos()], -1) * (half - log_scale).exp()
    own = plane_sides(x, planes)
    met = own if keys else own.flip(-1)
    parts = [side.flatten(-2)[..., None] * f[..., None, :] for side, f in ((met, positive), (own, trigonometric))]
    values = torch.cat([part.flatten(-2) for part in parts], -1) * projections.shape[-2] ** -0.5
    return LeveledFeatures(values, log_scale.squeeze(-1))


def angle_share(x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """lambda = theta/pi, accurate at small angles: by the arc tangent of |x^ - y^| over |x^ + y^|."""
    x, y = (z / z.norm(dim=-1, keepdim=True) for z in (x, y))
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1)) / torch.pi


def hybrid_variance(
    x: Float[Tensor, "*batch d"],
    y: Float[Tensor, "*batch d"],
    num_features: int,
    num_planes: int | float,
    *,
    shared: bool = True,
) -> Float[Tensor, "*batch"]:
    """The variance of the estimate for independent draws; `num_planes` may be infinite (lambda known)."""
    share = angle_share(x, y)
    noise = share * (1 - share) / num_planes
    squares = [z.square().sum(-1) for z in (x, y, x + y, x - y)]
    kernel = (x * y).sum(-1).exp()
    positive = kernel.square() * torch.expm1(squares[2])
    trigonometric = squares[2].exp() * torch.expm1(-squares[3]).square() / (2 * kernel.square())
    total = (share.square() + noise) * positive + ((1 - share).square() + noise) * trigonometric
    if shared:
        total = total + 2 * (share * (1 - share) - noise) * kernel.square() * ((squares[0] - squares[1]).cos() - 1)
    return total / num_features
