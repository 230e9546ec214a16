"""How much a key can ever weigh under a polynomial kernel: upper bounds of sensitivities, from Lewis weights.

The p-sensitivity of key j is alpha_j = sup_y |<k_j, y>|^p / sum_l |<k_l, y>|^p: no query gives it more than that. For
p = 2 it is the leverage score k_j^T (K^T K)^{-1} k_j. For p >= 2 and any positive weights w, with M = sum_l
w_l^{1-2/p} k_l k_l^T,

    alpha_j <= (sum_l w_l)^{p/2-1} (k_j^T M^{-1} k_j)^{p/2}:

x_l = <k_l, y> has x_j^2 <= k_j^T M^{-1} k_j sum_l w_l^{1-2/p} x_l^2, and that sum is at most (sum w)^{1-2/p} (sum
|x|^p)^{2/p} by Hoelder's inequality. Lewis weights, w_j = (k_j^T M^{-1} k_j)^{p/2}, sum to d and make it
d^{p/2-1} w_j, which sums to d^{p/2}: at most d^{p/2}/eps keys have a bound above eps, however many keys there are.

Lewis weights are the fixed point of w <- leverage scores of W^{1/2-1/p} K, a contraction with factor 1 - 2/p in the
logarithm for every p >= 2. (w <- (k_j^T M^{-1} k_j)^{p/2} has factor p/2 - 1 and does not converge from p = 4 on.)
Since the bound holds for any weights, stopping early costs sharpness, not validity.

A one in the denominator of the kernel is a further term of known size: adding `ridge` to M and 1 to sum_l w_l bounds
|<k_j, y>|^p / (1 + sum_l |<k_l, y>|^p) for every |y|^2 <= 1/ridge, by the same two inequalities with ridge |y|^2 <= 1
as the term of a key of weight one. So M is regular, whatever the keys.

Computed in the precision of `k`, which should be float64: M squares the condition number. Since any weights do, that of
a giant key in M is held at ridge / (REACH eps |k|^2): M keeps a factor, and the bound of that key is one or more.

Sources: "lp Row Sampling by Lewis Weights" (Cohen, Peng, 2015), https://arxiv.org/abs/1412.0588; "LevAttention: Time,
Space, and Streaming Efficient Algorithm for Heavy Attentions" (Kannan, Bhattacharyya, Kacham, Woodruff, 2024),
https://arxiv.org/abs/2410.05462. The form with the ridge is derived here.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.linalg.leverage import whitened

CHUNK = 64
REACH = 2.0**16


def inverse_forms(
    k: Float[Tensor, "*batch m d"], weight: Float[Tensor, "*batch m"], ridge: float
) -> Float[Tensor, "*batch m"]:
    """k_j^T (sum_l weight_l k_l k_l^T + ridge I)^{-1} k_j."""
    gram = k.mT @ (k * _held(weight, k, ridge)[..., None])
    return whitened(k, gram + ridge * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)).square().sum(-2)


def _held(weight: Float[Tensor, "*batch m"], k: Float[Tensor, "*batch m d"], ridge: float) -> Float[Tensor, "*batch m"]:
    """Weights with which no key alone makes M singular in its precision; as they are without a ridge."""
    if ridge == 0:
        return weight
    tiny, eps = torch.finfo(k.dtype).tiny, torch.finfo(k.dtype).eps
    return weight.minimum(ridge / (REACH * eps) / k.square().sum(-1).clamp_min(tiny))


def lewis_weights(
    k: Float[Tensor, "*batch m d"], degree: int | float, ridge: float, iterations: int
) -> Float[Tensor, "*batch m"]:
    """`iterations` steps of the contraction, from equal weights; the first gives (ridge) leverage scores."""
    w = torch.ones_like(k[..., 0])
    for _ in range(iterations):
        share = _held(w.pow(1 - 2 / degree), k, ridge)
        w = share * inverse_forms(k, share, ridge)
    return w


def sensitivity_bounds(
    k: Float[Tensor, "*batch m d"], degree: int | float, ridge: float, iterations: int
) -> Float[Tensor, "*batch m"]:
    """Upper bounds of what each key can weigh beside a one in the denominator, for |y|^2 <= 1/ridge; with `ridge` 0,
    for all y without a one (keys must then span the space)."""
    if degree == 2:
        return inverse_forms(k, torch.ones_like(k[..., 0]), ridge)
    w = lewis_weights(k, degree, ridge, iterations)
    total = w.sum(-1, keepdim=True) + (1 if ridge > 0 else 0)
    return total.pow(degree / 2 - 1) * inverse_forms(k, w.pow(1 - 2 / degree), ridge).pow(degree / 2)


def online_sensitivity_bounds(k: Float[Tensor, "b h n d"], degree: int | float, ridge: float) -> Float[Tensor, "b h n"]:
    """The same for key j among the keys up to j, hence among any longer prefix: more keys only add to the denominator.

    Weights must not depend on later keys. With h_j = k_j^T M^{-1} k_j, M of the chunks before, w_j = (h_j/(1 +
    h_j))^{p/2} is a lower estimate of the Lewis weight that solves the equation with k_j itself added; any would do.
    Within a chunk, L = chol(I + B^T B), column j of B being w_j^{1/2-1/p} times k_j whitened by M, has L_jj^2 = 1 +
    w_j^{1-2/p} k_j^T M_{j-1}^{-1} k_j, so that all forms k_j^T M_j^{-1} k_j are read off its diagonal. For p = 2 these
    are the online leverage scores, exactly. Time O(n d (d + CHUNK) + n d^3 / CHUNK).
    """
    d = k.shape[-1]
    gram = (ridge * torch.eye(d, dtype=k.dtype, device=k.device)).expand(*k.shape[:2], d, d)
    total = torch.ones_like(k[:, :, :1, 0])
    bounds = []
    for start in range(0, k.shape[2], CHUNK):
        rows = k[:, :, start : start + CHUNK]
        white = whitened(rows, gram)
        before = white.square().sum(-2)
        level = before / (1 + before)
        w, share = level.pow(degree / 2), _held(level.pow(degree / 2 - 1), rows, ridge)
        white = white * share.sqrt()[..., None, :]
        inner = white.mT @ white + torch.eye(rows.shape[2], dtype=k.dtype, device=k.device)
        pivots = torch.linalg.cholesky_ex(inner).L.diagonal(dim1=-2, dim2=-1).square()
        # Round-off would make a short key's form larger than the one without it.
        forms = ((pivots - 1) / (pivots * share.clamp_min(torch.finfo(k.dtype).tiny))).minimum(before)
        sums = total + w.cumsum(-1)
        bounds.append(sums.pow(degree / 2 - 1) * forms.pow(degree / 2))
        gram = gram + rows.mT @ (rows * share[..., None])
        total = sums[..., -1:]
    return torch.cat(bounds, -1)
