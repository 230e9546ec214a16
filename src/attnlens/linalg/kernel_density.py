"""Attention as kernel density estimation: its row sums, its column norms, and the product sampled by them.

For weights x_i > 0 let C = sum_i x_i e^{|k_i|^2 / 2}, and let y_i >= 0 solve x_i e^{|k_i|^2 / 2} e^{y_i^2 / 2} = C.
With the points k~_i = [k_i; y_i] and mu(z) = (1/n) sum_i e^{-|z - k~_i|^2 / 2} their Gaussian kernel density,

    kappa(q, K, x) = sum_i x_i e^{<q, k_i>} = e^{|q|^2 / 2} C n mu([q; 0]),

so whoever can estimate Gaussian densities up to 1 +- eps can estimate, up to 1 +- eps, the row sums of attention,
Z_i = kappa(d^{-1/4} q_i, d^{-1/4} K, 1), and the column norms of P = Z^{-1} A,

    |P_:j|^2 = sum_i Z_i^{-2} e^{2 <q_i, k_j> / sqrt(d)} = kappa(sqrt(2) d^{-1/4} k_j, sqrt(2) d^{-1/4} Q, Z^{-2}).

Here both are exact, streamed by `partial_attention` in O(n^2 d): an oracle for what density estimates would give.

`sampled_product` estimates P V by m columns of P drawn with p_j = (|P_:j|^2 / |P|_F^2 + |v_j|^2 / |V|_F^2) / 2. It is
unbiased, and with R = max(srank(P), srank(V)), srank(X) = |X|_F^2 / |X|^2, and L = log(n + dv),

    E |estimate - P V| <= (sqrt(4 R L / m) + 2 R L / (3 m)) |P| |V|   (spectral norms),

by the matrix Bernstein inequality: one term X_t = P_:j v_j^T / p_j has |X_t| <= |P|_F |V|_F since p_j >= |P_:j| |v_j| /
(|P|_F |V|_F), E X_t X_t^T has norm at most 2 |V|_F^2 |P|^2 and E X_t^T X_t at most 2 |P|_F^2 |V|^2. If Z is off by
1 +- eps, the estimate is off by as much again, row by row.

Source: "KDEformer: Accelerating Transformers via Kernel Density Estimation" (Zandieh, Han, Daliri, Karbasi, 2023),
https://arxiv.org/abs/2302.02451; "An Introduction to Matrix Concentration Inequalities" (Tropp, 2015),
https://arxiv.org/abs/1501.01571. Departures: the paper compares |P_:j|^2 with |v_j|^2 / |V|^2, which is our form up to
|P|^2 and without the factors of one half. The survey's identity lacks e^{|q|^2 / 2}, has e^{|k_i|^2} in the equation
of y_i, and speaks of row norms.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.linalg.blocks import take_rows
from attnlens.linalg.partial import partial_attention


def lifted_points(
    k: Float[Tensor, "b h m d"], log_weight: Float[Tensor, "b h m"]
) -> tuple[Float[Tensor, "b h m d+1"], Float[Tensor, "b h"]]:
    """The points k~_i and log C; weights must be positive (leave keys of weight zero out)."""
    log_share = log_weight + k.square().sum(-1) / 2
    log_total = torch.logsumexp(log_share, -1)
    lift = (2 * (log_total[..., None] - log_share)).clamp_min(0).sqrt()
    return torch.cat([k, lift[..., None]], -1), log_total


def log_kernel_sum(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], log_weight: Float[Tensor, "b h m"]
) -> Float[Tensor, "b h n"]:
    """log kappa(q, K, x), by its definition."""
    return partial_attention(q, k, torch.zeros_like(k[..., :1]), bias=log_weight[:, :, None], scale=1.0)[1]


def log_kernel_sum_by_density(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], log_weight: Float[Tensor, "b h m"]
) -> Float[Tensor, "b h n"]:
    """log kappa(q, K, x), by the Gaussian density of the lifted points: all distances, materialized."""
    points, log_total = lifted_points(k, log_weight)
    at = torch.cat([q, torch.zeros_like(q[..., :1])], -1)
    squared = (at[:, :, :, None] - points[:, :, None]).square().sum(-1)
    log_density = torch.logsumexp(-squared / 2, -1) - math.log(k.shape[2])
    return q.square().sum(-1) / 2 + log_total[..., None] + math.log(k.shape[2]) + log_density


def log_row_sums(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n"]:
    """log Z_i."""
    root = q.shape[-1] ** -0.25
    return log_kernel_sum(root * q, root * k, torch.zeros_like(k[..., 0]))


def log_column_squares(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], log_z: Float[Tensor, "b h n"]
) -> Float[Tensor, "b h m"]:
    """log |P_:j|^2, from the logarithms of the row sums."""
    root = 2**0.5 * q.shape[-1] ** -0.25
    return log_kernel_sum(root * k, root * q, -2 * log_z)


def column_probability(log_square: Float[Tensor, "b h m"], v: Float[Tensor, "b h m dv"]) -> Float[Tensor, "b h m"]:
    """p_j = (|P_:j|^2 / |P|_F^2 + |v_j|^2 / |V|_F^2) / 2."""
    square = v.square().sum(-1)
    return (torch.softmax(log_square, -1) + square / square.sum(-1, keepdim=True)) / 2


def sampled_product(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    log_z: Float[Tensor, "b h n"],
    probability: Float[Tensor, "b h m"],
    uniform: Float[Tensor, "b h s"],
) -> Float[Tensor, "b h n dv"]:
    """Z^{-1} A S^T S V, the rows of S drawn with replacement by inversion of the uniform numbers."""
    total = probability.cumsum(-1)
    chosen = torch.searchsorted(total, uniform * total[..., -1:], right=True).clamp_max(k.shape[2] - 1)
    log_weight = -(probability.gather(-1, chosen) * uniform.shape[-1]).log()
    out, lse = partial_attention(q, take_rows(k, chosen), take_rows(v, chosen), bias=log_weight[:, :, None])
    return out * (lse - log_z).exp()[..., None]


def bernstein_bound(
    weights: Float[Tensor, "*batch n m"], v: Float[Tensor, "*batch m dv"], num_samples: int
) -> Float[Tensor, "*batch"]:
    """The bound on the expected spectral error of `sampled_product`, from P and V as they are."""
    top_p, top_v = (torch.linalg.matrix_norm(x, 2) for x in (weights, v))
    ranks = [x.square().sum((-2, -1)) / top**2 for x, top in ((weights, top_p), (v, top_v))]
    each = torch.maximum(*ranks) * math.log(weights.shape[-2] + v.shape[-1]) / num_samples
    return ((4 * each).sqrt() + 2 * each / 3) * top_p * top_v
