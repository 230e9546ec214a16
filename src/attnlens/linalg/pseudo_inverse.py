"""Regularized inverses of square matrices: applied to right-hand sides, and judged by the first Penrose condition.

A core matrix C of attention is often so ill-conditioned (5e6 on trained models) that C^{-1} amplifies what the
landmarks do not resolve; a useful inverse is regularized, on purpose (`Ridge`) or by stopping early (`NewtonSchulz`).
How much is a matter of the data: `RidgePath` offers several strengths.
Both scale with C, and both treat every matrix by itself.

Source of the iteration: "Nyströmformer" (Xiong et al., 2021), https://arxiv.org/abs/2102.03902, after "Chebyshev-type
methods and preconditioning techniques" (Soleymani et al., 2012) and "A family of iterative methods for computing
Moore-Penrose inverse" (Li, Huang, Zhang, Liu, Gu, 2011). Departure: implementations start it from norms taken over the
whole batch, which makes an example's result depend on its neighbors.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class AbstractInverse(ABC):
    """A rule that turns (C, Y) into an approximation of C^+ Y, linear in Y."""

    @abstractmethod
    def __call__(self, c: Float[Tensor, "*batch l l"], y: Float[Tensor, "*batch l r"]) -> Float[Tensor, "*batch l r"]:
        """The approximation of C^+ Y."""

    def candidates(
        self, c: Float[Tensor, "*batch l l"], y: Float[Tensor, "*batch l r"]
    ) -> Float[Tensor, "k *batch l r"]:
        """The approximations that a caller may choose among; one, unless the rule has several."""
        return self(c, y)[None]


@dataclass(frozen=True)
class Ridge(AbstractInverse):
    """argmin_X |C X - Y|^2 + ridge |C|_1 |C|_inf |X|^2 by one solve; C^{-1} Y at ridge 0.

    |C|_1 |C|_inf is the cheap upper bound of the square of the largest singular value. In float32 a ridge below 1e-6
    is lost in the round-off of C^T C.
    """

    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise ValueError(f"`ridge` must be at least 0, got {self.ridge}; 1e-3 suits softmax matrices")

    def __call__(self, c: Float[Tensor, "*batch l l"], y: Float[Tensor, "*batch l r"]) -> Float[Tensor, "*batch l r"]:
        if self.ridge == 0:
            # The normal equations would square the condition number for nothing.
            return torch.linalg.solve_ex(c, y).result
        shift = self.ridge * norm_bound(c)
        gram = c.mT @ c + shift * torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
        return torch.linalg.solve_ex(gram, c.mT @ y).result


@dataclass(frozen=True)
class RidgePath(AbstractInverse):
    """`Ridge` at several strengths from one Gram matrix, for a caller that can tell which suits; alone, the first."""

    ridges: Sequence[float] = (1e-3, 1e-4, 1e-2)

    def __post_init__(self) -> None:
        if len(self.ridges) == 0 or not min(self.ridges) > 0:
            raise ValueError(f"`ridges` must be positive numbers, at least one, got {self.ridges}")

    def __call__(self, c: Float[Tensor, "*batch l l"], y: Float[Tensor, "*batch l r"]) -> Float[Tensor, "*batch l r"]:
        return Ridge(self.ridges[0])(c, y)

    def candidates(
        self, c: Float[Tensor, "*batch l l"], y: Float[Tensor, "*batch l r"]
    ) -> Float[Tensor, "k *batch l r"]:
        shifts = torch.stack([ridge * norm_bound(c) for ridge in self.ridges])
        gram = c.mT @ c + shifts * torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
        factor = torch.linalg.cholesky_ex(gram).L
        return torch.cholesky_solve((c.mT @ y).expand(*factor.shape[:-1], y.shape[-1]), factor)


@dataclass(frozen=True)
class NewtonSchulz(AbstractInverse):
    """Z Y with Z from a fixed number of steps of `newton_schulz`; the paper takes 6, which is not convergence."""

    iterations: int = 6

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"`iterations` must be at least 1, got {self.iterations}; the paper takes 6")

    def __call__(self, c: Float[Tensor, "*batch l l"], y: Float[Tensor, "*batch l r"]) -> Float[Tensor, "*batch l r"]:
        return newton_schulz(c, self.iterations) @ y


def newton_schulz(c: Float[Tensor, "*batch l l"], iterations: int) -> Float[Tensor, "*batch l l"]:
    """Z_0 = C^T / (|C|_1 |C|_inf), Z <- Z (13 I - C Z (15 I - C Z (7 I - C Z))) / 4, which tends to C^+.

    A singular value s contributes e = 1 - s^2 / (|C|_1 |C|_inf) to I - C Z_0, and one step maps e to (3 e^3 + e^4) / 4:
    convergence is of third order, after a number of steps that grows with the logarithm of the condition number. At
    s = 0 round-off grows by 13/4 a step: for a singular matrix more steps than 12 or so lose what they gained.
    """
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    z = c.mT / norm_bound(c)
    for _ in range(iterations):
        cz = c @ z
        z = z @ (13 * eye - cz @ (15 * eye - cz @ (7 * eye - cz))) / 4
    return z


def norm_bound(c: Float[Tensor, "*batch l l"]) -> Float[Tensor, "*batch 1 1"]:
    """|C|_1 |C|_inf, an upper bound of the squared largest singular value of every matrix."""
    size = c.abs()
    return (size.sum(-2).amax(-1) * size.sum(-1).amax(-1))[..., None, None]


def penrose_residual(c: Float[Tensor, "*batch l l"], z: Float[Tensor, "*batch l l"]) -> Float[Tensor, "*batch"]:
    """|C Z C - C| / |C| in the Frobenius norm: zero for the pseudo-inverse, one for Z = 0."""
    return torch.linalg.matrix_norm(c @ z @ c - c) / torch.linalg.matrix_norm(c)
