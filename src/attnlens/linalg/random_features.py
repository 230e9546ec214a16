"""Random features of the softmax kernel: draws of projections, and the feature maps built on them.

For x, y in R^d and w_1, ..., w_m ~ N(0, I),

    exp(<x, y>) = E <phi(x), phi(y)>,   phi(x) = m^{-1/2} exp(-|x|^2/2) (exp(<w_1, x>), ..., exp(<w_m, x>)),

the positive features, whose estimate has relative variance (e^{|x + y|^2} - 1) / m for independent w. Rows that are
orthogonal within blocks of d, with the norms of independent Gaussian vectors, leave every w_f N(0, I) and hence the
estimate unbiased; they reduce its variance. Here features are handed over as logarithms, since e^{<w, x>} leaves the
range of float32 at the scales that attention meets; what consumes them chooses the stabilizer.

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
