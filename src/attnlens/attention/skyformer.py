"""Skyformer: Gaussian-kernel attention by a Nyström approximation of the symmetrized kernel matrix.

What it approximates is another attention than softmax (target "gaussian"), without normalization:

    out = A V,   A = G(Q, K),   G(x, y) = exp(-|x - y|^2 / (2 sqrt(d))).

A is the upper right block of B = G([Q; K], [Q; K]), which is positive semidefinite. With l landmarks drawn uniformly
from the real rows of each half, L = [Q_J; K_J'],

    B ~ B~ = G([Q; K], L) (W + eps I)^{-1} G(L, [Q; K]),   W = G(L, L),   eps = ridge max_i sum_j W_ij,

and A~ is the block of B~. A block is never larger than its matrix, |A - A~| <= |B - B~| in the spectral and in the
Frobenius norm, and R = B - B~ is positive semidefinite for every eps >= 0, which bounds every output row:

    |out_i - out~_i| <= sqrt(R_ii) sum_j sqrt(R_jj) |v_j|,   i a query, j over the real keys.

Time O(n l (d + dv) + l^3), memory O(n d + l^2). With all points as landmarks B - B~ = eps B (B + eps I)^{-1}, of norm
at most eps: exact as the ridge tends to zero, however ill-conditioned B is.

Source: "Skyformer: Remodel Self-Attention with Gaussian Kernel and Nyström Method" (Chen, Zeng, Ji, Yang, 2021),
https://arxiv.org/abs/2111.00035. Departures: the authors' code has six Newton-Schulz steps on the core, scaled by its
degrees and shifted by 0.1; here it is a Cholesky factorization of a core shifted in proportion to its size. Landmarks
of an example depend on its real tokens alone. Tokens are recentered, to which G is invariant, for accuracy.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import take_rows
from attnlens.linalg.dense import mean_values
from attnlens.linalg.gaussian import gaussian_core, gaussian_naive, gaussian_product, nystrom_residual


def landmark_rows(
    priority: Int[Tensor, "h n"], num_landmarks: int, real: Bool[Tensor, "b n"]
) -> tuple[Int[Tensor, "b h l"], Bool[Tensor, "b l"]]:
    """The real tokens with the smallest priorities, and which of the l places hold a real token."""
    taken = min(num_landmarks, real.shape[1])
    order = priority.masked_fill(~real[:, None], torch.iinfo(priority.dtype).max)
    filled = torch.arange(taken, device=real.device) < real.sum(-1, keepdim=True)
    return order.topk(taken, largest=False).indices, filled


def ridged_core(
    landmarks: Float[Tensor, "b h l d"], filled: Bool[Tensor, "b l"], ridge: float
) -> Float[Tensor, "b h l l"]:
    """W + eps I; places that hold no token are rows and columns of the identity."""
    both = (filled[:, None] & filled[:, :, None])[:, None]
    core = torch.where(both, gaussian_core(landmarks, landmarks.shape[-1] ** -0.5), 0)
    eps = ridge * core.sum(-1).amax(-1)[..., None, None]
    eye = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    return core + torch.where(filled[:, None, :, None], eps, 1) * eye


class Skyformer(AbstractAttention):
    """Gaussian-kernel attention at landmarks of both halves.

    Args:
        num_landmarks: l, drawn from the queries and again from the keys, at least 1.
        num_heads: each draws its own landmarks.
        max_length: the longest input.
        seed: of the landmarks.
        ridge: eps relative to the largest row sum of the core, above 0; in float32 at least about 1e-6.
    """

    family = "low rank"
    budget = "num_landmarks"
    target = "gaussian"
    causal = False
    self_attention = True
    rows_independent = False

    def __init__(self, num_landmarks: int, num_heads: int, max_length: int, seed: int, ridge: float = 1e-4) -> None:
        super().__init__()
        if num_landmarks < 1:
            raise ValueError(f"`num_landmarks` must be at least 1, got {num_landmarks}")
        if not ridge > 0:
            raise ValueError(f"`ridge` must be above 0, got {ridge}: equal tokens make the core singular; 1e-4 will do")
        self.num_landmarks = num_landmarks
        self.ridge = ridge
        generator = torch.Generator().manual_seed(seed)
        self.priority: Tensor
        # Integers, which keep their order when the module is cast to half precision.
        order = torch.rand(2, num_heads, max_length, generator=generator, device="cpu").argsort(-1)
        self.register_buffer("priority", order)

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every query and key a landmark, up to the ridge."""
        return {"num_landmarks": length, "ridge": 1e-12}

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """A V in float64: the Gaussian kernel, not normalized."""
        if causal:
            raise ValueError("`causal=True` is not possible with Skyformer")
        q, k, v = q.double(), k.double(), v.double()
        if key_padding_mask is not None:
            k, v = (torch.where(key_padding_mask[:, None, :, None], x, 0) for x in (k, v))
        return gaussian_naive(q, k, q.shape[-1] ** -0.5) @ v

    def factorize(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], real: Bool[Tensor, "b n"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Bool[Tensor, "b l"]]:
        """Recentered queries and keys, landmarks, the Cholesky factor of W + eps I, and which landmarks are filled."""
        if q.shape[2] > self.priority.shape[-1]:
            raise ValueError(
                f"length {q.shape[2]} is beyond `max_length`={self.priority.shape[-1]}: build with a larger one"
            )
        center = (
            mean_values(q, causal=False, key_padding_mask=real) + mean_values(k, causal=False, key_padding_mask=real)
        ) / 2
        q, k = q - center, k - center
        chosen, filled = zip(
            *(landmark_rows(order[:, : q.shape[2]], self.num_landmarks, real) for order in self.priority), strict=True
        )
        landmarks = torch.cat([take_rows(x, rows) for x, rows in zip((q, k), chosen, strict=True)], 2)
        filled = torch.cat(filled, -1)
        factor = torch.linalg.cholesky_ex(ridged_core(landmarks, filled, self.ridge)).L
        return q, k, landmarks, factor, filled

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        scale = q.shape[-1] ** -0.5
        real = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        q, k, landmarks, factor, filled = self.factorize(q, k, real)
        columns = gaussian_product(landmarks, k, v, scale, key_padding_mask=key_padding_mask)
        columns = torch.where(filled[:, None, :, None], columns, 0)
        return gaussian_product(q, landmarks, torch.cholesky_solve(columns, factor), scale)

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """sqrt(R_ii) sum_j sqrt(R_jj) |v_j|, with the round-off of R_ii added."""
        real = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        q, k = (torch.where(real[:, None, :, None], x, 0) for x in (q, k))
        q, k, landmarks, factor, filled = self.factorize(q, k, real)
        residual = [nystrom_residual(x, landmarks, factor, filled[:, None], q.shape[-1] ** -0.5) for x in (q, k)]
        weight = torch.where(real[:, None], residual[1].sqrt() * v.norm(dim=-1), 0)
        return residual[0].sqrt() * weight.sum(-1, keepdim=True)
