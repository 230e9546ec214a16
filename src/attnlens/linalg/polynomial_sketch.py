"""The recursive Gaussian sketch of tensor powers, a binary tree of random products.

    phi_1(x) = x,   phi_2p(x) = r^{-1/2} (phi_p(x) G) * (phi_p'(x) G'),   * entrywise,

G and G' independent Gaussian matrices with r columns, phi_p and phi_p' independent draws: a tree with p leaves. With a
shared child, phi_p = phi_p', already phi_4 is biased. With independent ones E <phi_p(x), phi_p(y)> = <x, y>^p and

    Var <phi_p(x), phi_p(y)> <= ((1 + 8/r)^{p-1} - 1) |x|^{2p} |y|^{2p},   with equality at x = y.

Proof. Let T = E |phi_p(x)|^2 |phi_p(y)|^2, U = E <phi_p(x), phi_p(y)>^2, at unit vectors. For Gaussian g, E <a, g>^2
<b, g>^2 = |a|^2 |b|^2 + 2 <a, b>^2, so U_2p = ((T + 2U)^2 + (r - 1) U^2)/r and T_2p = ((T + 2U)^2 + (r - 1) T^2)/r, in
which U <= T gives T_2p <= T^2 (1 + 8/r), hence T_p <= (1 + 8/r)^{p-1} =: t_p. With (T + 2U)^2 - U^2 <= 8 t_p^2 and
U - <x, y>^{2p} <= t_p - 1 by induction, U_2p - <x, y>^{4p} <= 8 t_p^2/r + t_p^2 - 1 = t_2p - 1. All are equalities at
x = y. For p = 2 the variance is (|x|^4 |y|^4 + 4 <x, y>^2 |x|^2 |y|^2 + 3 <x, y>^4)/r.

Summed over pairs this is the approximate matrix product: E |phi(Q) phi(K)^T - (Q K^T)^p|_F^2 <= (t_p - 1) |Q^p|_F^2
|K^p|_F^2, with Q^p the matrix of p-th tensor powers of the rows. Time O(p d r + p r^2) a vector.

Sources: "Oblivious Sketching of High-Degree Polynomial Kernels" (Ahle et al., 2020), https://arxiv.org/abs/1909.01410;
"PolySketchFormer" (Kacham, Mirrokni, Zhong, 2023), https://arxiv.org/abs/2310.01655. The constants are derived here.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def draw_tree(
    num_heads: int, degree: int, dim: int, num_features: int, generator: torch.Generator
) -> tuple[Float[Tensor, "h p d r"], Float[Tensor, "h l r r"]]:
    """The Gaussian matrices at the leaves and, level by level from there, at the max(p - 2, 0) inner nodes."""
    leaves = torch.randn(num_heads, degree, dim, num_features, generator=generator, device="cpu")
    shape = (num_heads, max(degree - 2, 0), num_features, num_features)
    return leaves, torch.randn(shape, generator=generator, device="cpu")


def recursive_sketch(
    x: Float[Tensor, "b h n d"], leaves: Float[Tensor, "h p d r"], inner: Float[Tensor, "h l r r"]
) -> Float[Tensor, "b h n r"]:
    """phi_p(x) for p >= 2, a power of two: all nodes of a level in one product."""
    scale = leaves.shape[-1] ** -0.5
    nodes = x[:, :, None] @ leaves
    used = 0
    while True:
        nodes = nodes[:, :, 0::2] * nodes[:, :, 1::2] * scale
        width = nodes.shape[2]
        if width == 1:
            return nodes[:, :, 0]
        nodes = nodes @ inner[:, used : used + width]
        used += width


def relative_variance(degree: int, num_features: int) -> float:
    """t_p - 1: the variance of <phi_p(x), phi_p(x)> at unit vectors, and a bound for every pair of unit vectors."""
    return (1 + 8 / num_features) ** (degree - 1) - 1
