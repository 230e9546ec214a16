"""Keys and values from one latent: the maps of a layer side by side, cut to rank r.

    [W_K | W_V] ~ A B,   A of width x r, B of r x 2 G d,   L = x A cached in place of keys and values.

With activations X the cut is that of X [W_K | W_V] (whitened by the Cholesky factor of X^T X), the best rank r in the
output's norm by Eckart and Young; without, that of the weights. The factors are multiplied out again: the model is of
the class that it was, and what a cache of latents would hold is counted. Under rotating positions keys are rotated
after they are expanded, so that such a cache has to expand at every step; without, A and B merge into `Mla`.

Exact at r = min(width, 2 G d). Source: the joint decomposition of "Towards Economical Inference: Enabling DeepSeek's
Multi-Head Latent Attention in Any Transformer-based LLMs" (Ji et al., 2025), https://arxiv.org/abs/2502.14837, which
first frees most columns of the keys from rotation; here none are. The whitening as in "SVD-LLM: Truncation-aware
Singular Value Decomposition for Large Language Model Compression" (Wang et al., 2024),
https://arxiv.org/abs/2403.07378.
"""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.conversion.base import Converted, inputs, linears, multihead, put, ranked, with_projections
from attnlens.models.base import AbstractStack
from attnlens.projection.multihead import AbstractMultiHead


def truncated(
    weight: Float[Tensor, "w o"], rank: int, x: Float[Tensor, "n w"] | None = None
) -> tuple[Float[Tensor, "w r"], Float[Tensor, "r o"]]:
    """Factors of the best rank-r approximation in Frobenius norm, of x W where x is given and of W else."""
    weight = weight.double()
    if x is None:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank] * s[:rank], v[:rank]
    gram = x.double().T @ x.double()
    # Directions that never occur would leave the factor singular; they may be anything, so they are small.
    gram.diagonal().add_(1e-9 * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram).T
    u, s, v = torch.linalg.svd(factor @ weight, full_matrices=False)
    return torch.linalg.solve_triangular(factor, u[:, :rank] * s[:rank], upper=True), v[:rank]


def joint_svd(model: AbstractStack, rank: int, ids: Int[Tensor, "b n"] | None = None) -> Converted:
    """The model whose keys and values of a layer come from a latent of width `rank`.

    Args:
        ids: tokens whose activations decide what counts; None: the weights alone.

    Raises:
        ValueError: a `rank` out of range, or projections that cannot be converted.
    """
    activations = [None] * len(model.layers) if ids is None else inputs(model, ids)

    def change(layer: int, old: AbstractMultiHead) -> AbstractMultiHead:
        keys, values = linears(old)[1:]
        size = keys.out_features
        ranked(rank, min(old.width, 2 * size), "where it is exact")
        joint = torch.cat([keys.weight, values.weight]).detach().T
        down, up = truncated(joint, rank, activations[layer])
        product = (down @ up).T.to(joint.dtype)
        new = copy.deepcopy(old)
        for linear, rows in zip(linears(new)[1:], product.split(size), strict=True):
            put(linear, rows)
        return new

    first = multihead(model.layers[0])
    grouped = 2 * linears(first)[1].out_features
    share = rank * (first.width + grouped) / (first.width * grouped)
    return Converted(with_projections(model, change), share, rank)
