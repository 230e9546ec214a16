"""Generalized exponential features of the softmax kernel: positive features with a Gaussian factor of the draw.

For w ~ N(0, I), a diagonal A = diag(a) <= 0 and an orthogonal R, with B = (I - 4 A)^{1/2} and D = det(I - 4 A)^{1/4},

    phi_w(x) = D exp(w^T A w + <B w, R^T x> - |x|^2/2),   E phi_w(x) phi_w(y) = e^{<x, y>},

by E exp(w^T C w + <b, w>) = det(I - 2 C)^{-1/2} exp(b^T (I - 2 C)^{-1} b/2) at C = 2 A, b = B z, z = R^T (x + y). At
C = 4 A, b = 2 B z the same gives the second moment, relative to e^{2 <x, y>}:

    log E phi^2 = sum_i [log(1 - 4 a_i) - log(1 - 8 a_i)/2 + (2 (1 - 4 a_i)/(1 - 8 a_i) - 1) z_i^2].

Its mean over pairs is smallest, coordinate by coordinate, at

    a_i = (1 - 2 l_i - ((2 l_i + 1)^2 + 8 l_i)^{1/2})/16,   M = mean (x + y)(x + y)^T = R diag(l) R^T,

the root <= 0 of its derivative, -4/(1 - 4 a) + 4/(1 - 8 a) + 8 l/(1 - 8 a)^2 = 0; with one a for all coordinates at
l = tr M/d. a = 0 are positive features, with log E phi^2 = |x + y|^2. The mean of logarithms is what is optimal: a
single pair may do worse.

Sources: "Chefs' Random Tables: Non-Trigonometric Random Features" (Likhosherstov, Choromanski, Dubey, Liu, Sarlos,
Weller, 2022), https://arxiv.org/abs/2205.15317, for one a; "FAVOR#: Sharp Attention Kernel Approximations via New
Classes of Positive Random Features" (Likhosherstov, Choromanski, Dubey, Liu, Sarlos, Weller, 2023),
https://arxiv.org/abs/2302.00787, for a matrix A.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def optimal_coefficients(second_moment: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """a for l, the mean square of a coordinate of x + y."""
    twice = 2 * second_moment
    return (1 - twice - ((twice + 1).square() + 4 * twice).sqrt()) / 16


def log_second_moment(z: Float[Tensor, "*any d"], a: Float[Tensor, "*#any d"]) -> Float[Tensor, "*any"]:
    """log E phi(x)^2 phi(y)^2 - 2 <x, y> for z = R^T (x + y)."""
    constant = torch.log1p(-4 * a) - torch.log1p(-8 * a) / 2
    return (constant + (2 * (1 - 4 * a) / (1 - 8 * a) - 1) * z.square()).sum(-1)


def pair_moment(
    x: Float[Tensor, "b h n d"], y: Float[Tensor, "b h m d"], key_padding_mask: Bool[Tensor, "b m"] | None
) -> Float[Tensor, "h d d"]:
    """mean (x_i + y_j)(x_i + y_j)^T over all pairs of an example, averaged over examples, for every head.

    With `key_padding_mask`, of real tokens alone; queries are then the same tokens as keys.
    """
    x, y = x.double(), y.double()
    weight = (
        torch.ones_like(y[:, :1, :, :1]) if key_padding_mask is None else key_padding_mask[:, None, :, None].double()
    )
    of_x = weight if key_padding_mask is not None else torch.ones_like(x[:, :1, :, :1])
    square_x, mean_x = _moments(x, of_x)
    square_y, mean_y = _moments(y, weight)
    cross = mean_x[..., :, None] * mean_y[..., None, :]
    return (square_x + square_y + cross + cross.mT).mean(0)


def _moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means over tokens of x x^T and of x."""
    x, total = torch.where(weight > 0, x, 0), weight.sum(2).clamp_min(1)
    return (x * weight).mT @ x / total[..., None], (x * weight).sum(2) / total
