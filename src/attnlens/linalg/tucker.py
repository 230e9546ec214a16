"""Tucker decomposition by successive truncation: a core and one orthonormal factor a mode, differentiable.

    X ~ G x_1 U_1 ... x_m U_m,   G = X x_1 U_1^T ... x_m U_m^T,

mode after mode from the last, U_i the r_i leading eigenvectors of the Gram matrix of the i-th unfolding of what is
left: each step drops the tail of its own spectrum, the drops are orthogonal,

    |X - X~|_F^2 = sum_i sum_{l > r_i} lambda_l^(i) <= m min |X - Y|_F^2 over all Y of these ranks,

and a mode whose rank is its size is left alone. Time O(N sum_i N_i + sum_i N_i^3) for N entries.

Sources: "A New Truncation Strategy for the Higher-Order Singular Value Decomposition" (Vannieuwenhoven, Vandebril,
Meerbergen, 2012), https://doi.org/10.1137/110836067; "A Multilinear Singular Value Decomposition" (De Lathauwer, De
Moor, Vandewalle, 2000). The factors come from Gram matrices, which cost less than the unfoldings' singular values and
leave out directions below sqrt(eps) of the largest.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlens.linalg.grid import mode_product


class _Leading(torch.autograd.Function):
    """Gram matrix -> its leading eigenvectors, moved within their complement only.

    A perturbation E moves u_j by sum_{i > r} u_i (u_i^T E u_j) / (lambda_j - lambda_i). What it does within the leading
    space is left out: nothing that depends on U U^T sees it, and single eigenvectors of equal eigenvalues have no
    derivative. The same holds for pairs whose gap is round-off.
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, rank: int) -> Tensor:
        energy, directions = torch.linalg.eigh(gram)
        energy, directions = energy.flip(-1), directions.flip(-1)
        ctx.rank = rank
        ctx.save_for_backward(energy, directions)
        return directions[..., :rank].contiguous()

    @staticmethod
    @once_differentiable  # its wrapper hides the names of the arguments from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        energy, directions = ctx.saved_tensors
        kept, cut = directions[..., : ctx.rank], directions[..., ctx.rank :]
        gap = energy[..., None, : ctx.rank] - energy[..., ctx.rank :, None]
        joined = gap > energy.shape[-1] * torch.finfo(energy.dtype).eps * energy[..., :1, None]
        moved = torch.where(joined, (cut.mT @ grad_outputs[0]) / torch.where(joined, gap, 1), 0)
        grad = cut @ moved @ kept.mT
        return (grad + grad.mT) / 2, None


def leading_directions(gram: Float[Tensor, "*k n n"], rank: int) -> Float[Tensor, "*k n r"]:
    """Orthonormal columns that span the leading eigenspace; differentiable for what depends on that space alone."""
    return _Leading.apply(gram, rank)


class Tucker(NamedTuple):
    """A core and a factor for each mode behind (batch, heads); None where a mode is not compressed."""

    core: Float[Tensor, "b h *ranks"]
    factors: tuple[Float[Tensor, "b h _ _"] | None, ...]

    def size(self) -> int:
        """Numbers of one head of one example, core and factors."""
        return sum(x[0, 0].numel() for x in (self.core, *self.factors) if x is not None)

    def expand(self, modes: int) -> Float[Tensor, "b h *grid"]:
        """The core times the factors of the first `modes` modes."""
        x = self.core
        for mode, factor in enumerate(self.factors[:modes]):
            if factor is not None:
                x = mode_product(x, factor, mode)
        return x


def tucker(x: Float[Tensor, "b h *grid"], rank: int) -> Tucker:
    """The decomposition with ranks min(rank, N_i)."""
    factors: list[Tensor | None] = [None] * (x.ndim - 2)
    for mode in reversed(range(x.ndim - 2)):
        if rank >= x.shape[2 + mode]:
            continue
        rows = x.movedim(2 + mode, 2).flatten(3)
        factor = leading_directions(rows @ rows.mT, rank)
        factors[mode] = factor
        x = mode_product(x, factor.mT, mode)
    return Tucker(x, tuple(factors))
