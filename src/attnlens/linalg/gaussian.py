"""The Gaussian kernel and its products with tall matrices, streamed through the softmax primitive.

    G(x, y) = exp(-s |x - y|^2 / 2) = exp(s <x', y'>),   x' = [x, -|x|^2 / 2, 1],   y' = [y, 1, -|y|^2 / 2],

so that the attention of x' over y' has lse_i = log sum_j G(x_i, y_j) and

    sum_j G(x_i, y_j) v_j = exp(lse_i) out_i,

without the matrix, without overflow (every exponent is at most 0) and with gradients in x, y and v. Time
O(n m (d + dv)), memory O((n + m)(d + dv)).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.linalg.partial import partial_attention


def gaussian_product(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    scale: float,
    *,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
    bias: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """G(x, y) v over the real rows of y; `bias` is added to the exponents and receives no gradient."""
    x_squared, y_squared = (-z.square().sum(-1, keepdim=True) / 2 for z in (x, y))
    rows = torch.cat([x, x_squared, torch.ones_like(x_squared)], -1)
    columns = torch.cat([y, torch.ones_like(y_squared), y_squared], -1)
    out, lse = partial_attention(rows, columns, v, key_padding_mask=key_padding_mask, bias=bias, scale=scale)
    return out * lse.exp()[..., None]


def gaussian_core(x: Float[Tensor, "*batch l d"], scale: float) -> Float[Tensor, "*batch l l"]:
    """G(x, x), with ones on the diagonal and between equal rows."""
    gram = x @ x.mT
    # Norms from the Gram matrix itself: those of equal rows then cancel to zero, not to round-off of either sign.
    squared = gram.diagonal(dim1=-2, dim2=-1)
    gap = gram - (squared[..., :, None] + squared[..., None, :]) / 2
    return (scale * gap.clamp_max(0)).exp()


def gaussian_naive(
    x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"], scale: float
) -> Float[Tensor, "*batch n m"]:
    """G(x, y) by its definition, materialized, with every difference taken: the reference of the forms above."""
    return (-scale / 2 * torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()).exp()


def nystrom_residual(
    x: Float[Tensor, "b h n d"],
    landmarks: Float[Tensor, "b h l d"],
    factor: Float[Tensor, "b h l l"],
    filled: Bool[Tensor, "b #h l"],
    scale: float,
) -> Float[Tensor, "b h n"]:
    """Diagonal of G - G_:L (L L^T)^{-1} G_L: at the points x, from the Cholesky factor L of a core that may hold a
    ridge: 1 - |L^{-1} G(L, x)|^2, with its round-off added so that it stays an upper bound."""
    cross = torch.where(filled[..., None], gaussian_naive(landmarks, x, scale), 0)
    explained = torch.linalg.solve_triangular(factor, cross, upper=False).square().sum(-2)
    return (1 - explained).clamp_min(0) + 8 * factor.shape[-1] * torch.finfo(x.dtype).eps
