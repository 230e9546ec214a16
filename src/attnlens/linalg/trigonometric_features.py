"""Trigonometric random features of the Gaussian kernel, on vectors of unit length.

    phi(x) = m^{-1/2} (sin <w_f, x>, cos <w_f, x>)_f,   w_f ~ N(0, I/sigma^2),   |phi(x)| = 1,
    E <phi(x), phi(y)> = K(x, y) = exp(-|x - y|^2 / (2 sigma^2)),   Var = (1 - e^{-|x - y|^2 / sigma^2})^2 / (2 m)

for independent w: <phi(x), phi(y)> is the mean of cos <w_f, z>, z = x - y, and E cos^2 <w, z> = (1 + K^4)/2. Of two
keys, with cos a cos b = (cos(a - b) + cos(a + b))/2,

    m Cov(<phi(x), phi(y)>, <phi(x), phi(y')>) = (K(y, y') + K(2x - y - y', 0))/2 - K(x, y) K(x, y').

The estimate of a pair is exact at x = y and worst for far pairs, where its deviation (2 m)^{-1/2} does not fall with K.

Source: "Random Features for Large-Scale Kernel Machines" (Rahimi, Recht, 2007). The covariance is derived here.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def unit_length(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """x / |x|, and zero where x is."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def trigonometric_features(
    x: Float[Tensor, "*batch n d"], projections: Float[Tensor, "*batch m d"]
) -> Float[Tensor, "*batch n 2*m"]:
    """phi(x), the sines before the cosines."""
    angle = x @ projections.mT
    return torch.cat([angle.sin(), angle.cos()], -1) * projections.shape[-2] ** -0.5


def gaussian_values(
    x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"], sigma: Float[Tensor, "..."]
) -> Float[Tensor, "*batch n m"]:
    """K(x_i, y_j); sigma broadcasts to the result."""
    square = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    return torch.exp(-square / (2 * sigma**2))


def feature_covariance(
    x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"], sigma: Float[Tensor, "..."]
) -> Float[Tensor, "*batch n m m"]:
    """m Cov(<phi(x_i), phi(y_j)>, <phi(x_i), phi(y_l)>) for independent frequencies; sigma broadcasts to (n, m)."""
    to_keys, among_keys = gaussian_values(x, y, sigma), gaussian_values(y, y, sigma)
    offsets = x[..., :, None, :] - y[..., None, :, :]
    mirrored = (offsets[..., :, None, :] + offsets[..., None, :, :]).square().sum(-1)
    mirrored = torch.exp(-mirrored / (2 * sigma[..., None] ** 2))
    return (among_keys[..., None, :, :] + mirrored) / 2 - to_keys[..., :, None] * to_keys[..., None, :]
