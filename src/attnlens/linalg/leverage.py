"""Leverage scores: how much of its own direction a row of a matrix holds.

    l_j = k_j^T (K^T K + lambda I)^{-1} k_j = sup_y <k_j, y>^2 / (sum_l <k_l, y>^2 + lambda |y|^2),
    lambda = 10^{-10} tr(K^T K).

Without lambda they are the squared rows of an orthonormal basis of the columns, between 0 and 1, and sum to the rank.
The ridge gives a rank-deficient K its own rank, where a QR factorization would fill up with arbitrary directions: one
below 10^{-5} of the Frobenius norm counts as absent. Time O(n d^2 + d^3), memory O(n d), in float64, since the Gram
matrix squares the condition number. No gradient.

Source: "Relative-Error CUR Matrix Decompositions" (Drineas, Mahoney, Muthukrishnan, 2008),
https://arxiv.org/abs/0708.3696; the ridge is that of "Fast Randomized Kernel Ridge Regression with Statistical
Guarantees" (Alaoui, Mahoney, 2015), https://arxiv.org/abs/1411.0306.
"""

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-10


def whitened(x: Float[Tensor, "*batch n d"], gram: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch d n"]:
    """L^{-1} x_j in columns, M = L L^T the Gram matrix: their squared norms are x_j^T M^{-1} x_j."""
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, x.mT, upper=False)


@torch.no_grad()
def leverage_scores(x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n"]:
    """l_j of every row, in float64; a zero row (padding) has none and changes no other's."""
    x = x.double()
    gram = x.mT @ x
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    # An all-zero matrix has no directions at all, and any positive ridge says so.
    ridge = torch.where(ridge > 0, ridge, 1)[..., None, None]
    return whitened(x, gram + ridge * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).square().sum(-2)
