"""Random features of the softmax kernel: draws of projections, and the feature maps built on them.

For x, y in R^d and w_1, ..., w_m ~ N(0, I),

    exp(<x, y>) = E <phi(x), phi(y)>,   phi(x) = m^{-1/2} exp(-|x|^2/2) (exp(<w_1, x>), ..., exp(<w_m, x>)),

the positive features, whose estimate has relative variance (e^{|x + y|^2} - 1) / m for independent w. Rows that are
orthogonal within blocks of d, with the norms of independent Gaussian vectors, leave every w_f N(0, I) and hence the
estimate unbiased; they reduce its variance. Here features are handed over as logarithms, since e^{<w, x>} leaves the
range of float32 at the scales that attention meets; what consumes them chooses the stabilizer.

Variances of one independent draw relative to the square of K = e^{<x, y>}, with s = |x + y|^2 and r = |x - y|^2, so
that K^2 = e^{(s - r)/2} and e^{|x|^2 + |y|^2} = e^{(s + r)/2}; a mean over m has 1/m of them:

    positive       p(w) = e^{<w, x + y> - (|x|^2 + |y|^2)/2},   E p^2 = K^2 e^s,   relative variance e^s - 1,
    hyperbolic     (p(w) + p(-w))/2,   E p(w) p(-w) = K^2 e^{-s},   (e^s + e^{-s})/2 - 1 = (1 - e^{-s}) (e^s - 1)/2,
    trigonometric  e^{(|x|^2 + |y|^2)/2} cos <w, x - y>,   E cos^2 = (1 + e^{-2r})/2,   e^r (1 - e^{-r})^2/2.

So positive features are exact for opposite x and y, trigonometric ones for equal, and no kind of them carries
information where s and r are both well above log m.

Sources: "Rethinking Attention with Performers" (Choromanski et al., 2021), https://arxiv.org/abs/2009.14794;
"Orthogonal Random Features" (Yu et al., 2016), https://arxiv.org/abs/1610.09072.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_projections(
    num_features: int, dim: int, *, orthogonal: bool, generator: torch.Generator
) -> Float[Tensor, "m d"]:
    """`num_features` draws from N(0, I_dim) in float64; with `orthogonal`, orthogonal within blocks of `dim` rows.

    The orthogonal directions are Haar distributed (QR with the signs of R removed). Their norms are those of
    Gaussian vectors: the constant norm sqrt(dim) would bias the estimate.
    """
    gaussian = torch.randn(num_features, dim, generator=generator, dtype=torch.float64, device="cpu")
    if not orthogonal:
        return gaussian
    num_blocks = -(-num_features // dim)
    square = torch.randn(num_blocks, dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    directions, triangle = torch.linalg.qr(square)
    directions = directions * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    directions = directions.mT.reshape(-1, dim)[:num_features]
    return directions * gaussian.norm(dim=-1, keepdim=True)


def positive_log_features(
    x: Float[Tensor, "*batch n d"], projections: Float[Tensor, "*batch m d"]
) -> Float[Tensor, "*batch n m"]:
    """log phi(x), the logarithm of the positive features: <w_f, x> - |x|^2/2 - log(m)/2."""
    num_features = projections.shape[-2]
    return x @ projections.mT - x.square().sum(-1, keepdim=True) / 2 - math.log(num_features) / 2


def positive_log_variance(s: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """log(e^s - 1), the relative variance of one positive draw; s = |x + y|^2."""
    return s + torch.log(-torch.expm1(-s))


def hyperbolic_log_variance(s: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """log((1 - e^{-s}) (e^s - 1)/2), the relative variance of one opposite pair; s = |x + y|^2."""
    return s + 2 * torch.log(-torch.expm1(-s)) - math.log(2)


def trigonometric_log_variance(r: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """log(e^r (1 - e^{-r})^2/2), the relative variance of one sine and cosine; r = |x - y|^2."""
    return r + 2 * torch.log(-torch.expm1(-r)) - math.log(2)
