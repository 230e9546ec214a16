"""Extreme compression: all of a model's slices of weights from two shared bases, at three levels.

    (1) X_i ~ U_i V_i            a truncated SVD each: m r (w + s) numbers for m w s,
    (2) X_i ~ B G_i C^T          shared bases: r w + r s + m r^2,
    (3) X_i ~ B (sum_k A_ik G_k) C^T     shared cores as well: r w + r s + q r^2 + m q.

(1) is the best of its kind (Eckart and Young); (2) is a Tucker decomposition with the identity in its first mode, (3) a
whole one, both by TensorLy (higher order orthogonal iteration).

Source: "Exploring extreme parameter compression for pre-trained language models" (Wang et al., 2022),
https://arxiv.org/abs/2205.10036, whose equation for (3) must read G_k inside the sum. The paper distills afterwards;
here nothing is trained.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.conversion.base import Converted, ranked
from attnlens.conversion.joint_svd import truncated
from attnlens.conversion.slices import slices, with_slices
from attnlens.models.base import AbstractStack

Cut = tuple[Float[Tensor, "m w s"], int]


def separate(x: Float[Tensor, "m w s"], rank: int) -> Cut:
    """Level 1, and how many numbers it keeps."""
    ranked(rank, min(x.shape[1:]), "where it is exact")
    parts = [truncated(matrix, rank) for matrix in x]
    return torch.stack([down @ up for down, up in parts]), len(x) * rank * sum(x.shape[1:])


def shared_bases(x: Float[Tensor, "m w s"], rank: int) -> Cut:
    """Level 2."""
    ranked(rank, min(x.shape[1:]), "where the shorter side is exact")
    return tucker(x, (len(x), rank, rank), kept_modes=(0,))


def shared_cores(x: Float[Tensor, "m w s"], rank: int, cores: int) -> Cut:
    """Level 3 with `cores` of the G_k."""
    ranked(rank, min(x.shape[1:]), "where the shorter side is exact")
    ranked(cores, len(x), "the number of slices")
    return tucker(x, (cores, rank, rank))


def tucker(x: Tensor, ranks: tuple[int, ...], *, kept_modes: tuple[int, ...] = ()) -> tuple[Tensor, int]:
    """The tensor of a Tucker decomposition of these ranks, and its numbers; `kept_modes` have the identity."""
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot  # pyright: ignore[reportAttributeAccessIssue] - of a backend

    modes = [mode for mode in range(x.ndim) if mode not in kept_modes]
    (core, factors), _ = partial_tucker(
        x.double().numpy(), rank=[ranks[mode] for mode in modes], modes=modes, n_iter_max=3, tol=1e-5
    )
    whole = multi_mode_dot(core, factors, modes=modes)
    return torch.from_numpy(whole), core.size + sum(factor.size for factor in factors)


def extreme(model: AbstractStack, cut: Callable[[Float[Tensor, "m w s"]], Cut]) -> Converted:
    """The model with the slices that `cut` makes of all of them, e.g. `partial(shared_bases, rank=128)`.

    Raises:
        ValueError: ranks out of range, or weights that make no equal slices.
    """
    stack, _ = slices(model)
    new, kept = cut(stack.flatten(0, 1))
    converted = with_slices(model, new.to(stack.dtype).unflatten(0, stack.shape[:2]))
    return Converted(converted, kept / stack.numel(), _cache(model))


def _cache(model: AbstractStack) -> int:
    from attnlens.conversion.base import linears, multihead

    return 2 * linears(multihead(model.layers[0]))[1].out_features
