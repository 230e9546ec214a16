"""Hybrid random features: positive and trigonometric features of the softmax kernel, mixed by the angle of the pair.

    SM_+ = e^{-(|x|^2 + |y|^2)/2} mean_f e^{<w_f, x + y>},   SM_trig = e^{(|x|^2 + |y|^2)/2} mean_f cos <w_f, x - y>,
    L = 1/2 - (1/2k) sum_r sgn <u_r, x> sgn <u_r, y>,   E L = theta/pi =: lambda,   w_f, u_r ~ N(0, I) independent,
    estimate = L SM_+ + (1 - L) SM_trig,

theta the angle of x and y, m frequencies w_f shared by both, k planes u_r. SM_+ is exact at x = -y, SM_trig at x = y,
and the weights follow. Every term is an inner product of features, tensor products of psi(x) = k^{-1/2} sgn(U x) with
those of SM: in all 3 m (1 + k) coordinates.

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


def plane_signs(x: Float[Tensor, "*batch n d"], planes: Float[Tensor, "*batch k d"]) -> Float[Tensor, "*batch n k"]:
    """psi(x); without gradient."""
    signs = torch.where(x.detach() @ planes.mT >= 0, 1, -1).to(x.dtype)
    return signs * planes.shape[-2] ** -0.5


def hybrid_features(
    x: Float[Tensor, "b h n d"],
    projections: Float[Tensor, "b h m d"],
    planes: Float[Tensor, "b h k d"],
    *,
    keys: bool,
) -> LeveledFeatures:
    """Coordinates without angle, [SM_+, SM_trig], then those of [SM_+, SM_trig] for each plane; the sign with which the
    angle weighs SM_+ is in the features of the queries."""
    angle, half = x @ projections.mT, x.square().sum(-1, keepdim=True) / 2
    log_positive = angle - half
    log_scale = log_positive.detach().amax(-1, keepdim=True).maximum(half.detach())
    positive, size = (log_positive - log_scale).exp(), (half - log_scale).exp()
    base = torch.cat([positive, size * angle.sin(), size * angle.cos()], -1) * (2 * projections.shape[-2]) ** -0.5
    psi = plane_signs(x, planes)
    turned = base if keys else torch.cat([-base[..., : positive.shape[-1]], base[..., positive.shape[-1] :]], -1)
    mixed = (psi[..., :, None] * turned[..., None, :]).flatten(-2)
    return LeveledFeatures(torch.cat([base, mixed], -1), log_scale.squeeze(-1))


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
