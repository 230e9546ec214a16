"""TRAWL: a model's slices of weights stacked to one tensor and replaced by its low-rank reconstruction.

    order 3: (slices, width, s);  order 4: (layers, slices a layer, width, s);  order 5: (layers, slices a layer, heads,
    width / heads, s),   CP: sum_r a_r o b_r o c_r ..., or Tucker;   across all layers or layer by layer.

Nothing is trained afterwards; the paper reports that on some tasks a little of it denoises.

Source: "TRAWL: Tensor Reduced and Approximated Weights for Large Language Models" (Luo et al., 2024),
https://arxiv.org/abs/2406.17261; the higher orders follow the survey's account of extreme compression.
"""

import torch
from torch import Tensor

from attnlens.conversion.base import Converted, linears, multihead, ranked
from attnlens.conversion.extreme import tucker
from attnlens.conversion.slices import slices, with_slices
from attnlens.models.base import AbstractStack


def cp(x: Tensor, rank: int, *, iterations: int = 25) -> tuple[Tensor, int]:
    """The tensor of a canonical polyadic decomposition by alternating least squares, and its numbers."""
    import tensorly as tl
    from tensorly.decomposition import parafac

    found = parafac(x.double().numpy(), rank, init="random", random_state=0, n_iter_max=iterations, tol=1e-6)
    whole = tl.cp_to_tensor(found)
    return torch.from_numpy(whole), rank * sum(x.shape)


def trawl(
    model: AbstractStack,
    *,
    rank: int | tuple[int, ...],
    kind: str = "cp",
    order: int = 3,
    layerwise: bool = False,
) -> Converted:
    """The model with reconstructed weights.

    Args:
        rank: of CP, or the ranks of Tucker, one a mode.
        order: of the tensor, 3, 4 or 5; layer by layer 3 only.
        layerwise: each layer by itself.

    Raises:
        ValueError: an unknown kind or order, ranks that do not fit, or weights that make no equal slices.
    """
    if kind not in ("cp", "tucker") or order not in (3, 4, 5) or (layerwise and order != 3):
        raise ValueError(
            f"`kind` must be cp or tucker, `order` 3, 4 or 5, and 3 if `layerwise`, got {kind!r}, {order}, {layerwise}"
        )
    stack, _ = slices(model)
    parts = stack.unbind(0) if layerwise else (_shaped(stack, order, multihead(model.layers[0]).num_heads),)
    results = [_reconstructed(part, rank, kind) for part in parts]
    kept = sum(number for _, number in results)
    new = torch.stack([whole for whole, _ in results]).reshape(stack.shape)
    cache = 2 * linears(multihead(model.layers[0]))[1].out_features
    return Converted(with_slices(model, new.to(stack.dtype)), kept / stack.numel(), cache)


def _shaped(stack: Tensor, order: int, num_heads: int) -> Tensor:
    return {3: stack.flatten(0, 1), 4: stack, 5: stack.unflatten(2, (num_heads, -1))}[order]


def _reconstructed(x: Tensor, rank: int | tuple[int, ...], kind: str) -> tuple[Tensor, int]:
    if kind == "cp":
        if not isinstance(rank, int):
            raise ValueError(f"`rank` of cp must be one number, got {rank}")
        return cp(x, ranked(rank, x.numel() // max(x.shape), "where every tensor of this shape is one"))
    ranks = (rank,) * x.ndim if isinstance(rank, int) else tuple(rank)
    if len(ranks) != x.ndim or any(not 1 <= r <= n for r, n in zip(ranks, x.shape, strict=False)):
        raise ValueError(f"`rank` of tucker must have one rank a mode, at most {tuple(x.shape)}, got {ranks}")
    return tucker(x, ranks)
