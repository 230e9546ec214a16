"""Truncated SVD of the softmax matrix: the best matrix of rank r, the oracle of low-rank attention.

    out = P_r V,   P_r = sum_{l <= r} sigma_l u_l w_l^T,   P = softmax(Q K^T / sqrt(d)) = sum_l sigma_l u_l w_l^T.

No matrix of rank r is nearer to P in the Frobenius or the spectral norm (Eckart-Young):

    |P - P_r|_F^2 = sum_{l > r} sigma_l^2,   |P - P_r|_2 = sigma_{r+1},   |out_i - (P V)_i| <= sigma_{r+1} |V|_2.

It is not the best for the output: P V V^+ has rank d_v at most and no output error at all. Rows of P_r need not sum to
one and weights may be negative. Time O(n^3), memory O(n^2): an oracle, never a saving. With rank >= n nothing is cut
and softmax attention is computed directly. Not causal: P_r of a triangular P is not triangular.

Source: "The approximation of one matrix by another of lower rank" (Eckart, Young, 1936). The gradient is that of the
truncation as a whole and needs a gap between sigma_r and sigma_{r+1} only, as in "A geometric approach to dynamical
model order reduction" (Feppon, Lermusiaux, 2018), https://arxiv.org/abs/1705.08521; that of the single factors would
need all singular values to be distinct.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.dense import softmax_round_off, softmax_weights
from attnlens.linalg.partial import partial_attention


class _Truncate(torch.autograd.Function):
    """P -> P_r.

    In the bases of P, a perturbation E changes the part of P_r that joins a kept index i and a dropped one j, t =
    sigma_j / sigma_i, by (E_ij + t E_ji) / (1 - t^2) and the mirrored formula; kept with kept by E; dropped with
    dropped not at all. The map is symmetric: the gradient is mapped by the same formula. Where the gap is zero P_r has
    no derivative; the pair's excess over t = 0 is then left out.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, rank: int) -> Tensor:
        left, sigma, right = torch.linalg.svd(p, full_matrices=False)
        ctx.rank = rank
        ctx.save_for_backward(left, sigma, right)
        return (left[..., :rank] * sigma[..., None, :rank]) @ right[..., :rank, :]

    @staticmethod
    @once_differentiable  # its wrapper hides the names of the arguments from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        left, sigma, right = ctx.saved_tensors
        r = ctx.rank
        u, u_cut, w, w_cut = left[..., :r], left[..., r:], right.mT[..., :r], right.mT[..., r:]
        kept_rows, kept_columns = u.mT @ grad, grad @ w
        t = sigma[..., None, r:] / sigma[..., :r, None].clamp_min(torch.finfo(sigma.dtype).tiny)
        gap = 1 - t.square()
        joined = gap > 0
        gap = torch.where(joined, gap, 1)
        own, mirrored = (torch.where(joined, x / gap, 0) for x in (t.square(), t))
        row_part, column_part = kept_rows @ w_cut, (u_cut.mT @ kept_columns).mT
        rows = kept_rows + (own * row_part + mirrored * column_part) @ w_cut.mT
        columns = kept_columns - u @ (u.mT @ kept_columns) + u_cut @ (own * column_part + mirrored * row_part).mT
        return u @ rows + columns @ w.mT, None


def truncate(p: Float[Tensor, "*k n m"], rank: int) -> Float[Tensor, "*k n m"]:
    """The best approximation of every matrix by one of rank `rank`; differentiable."""
    return _Truncate.apply(p, rank)


def svd_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    rank: int,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """P_r V, P over the real tokens alone."""
    if rank >= k.shape[2]:
        out = partial_attention(q, k, v, key_padding_mask=key_padding_mask)[0]
        return out if key_padding_mask is None else torch.where(key_padding_mask[:, None, :, None], out, 0)
    return truncate(real_weights(q, k, key_padding_mask), rank) @ v


def real_weights(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], key_padding_mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b h n n"]:
    """P with the rows of padded queries at zero, so that they add nothing to its singular values."""
    weights = softmax_weights(q, k, key_padding_mask=key_padding_mask)
    return weights if key_padding_mask is None else torch.where(key_padding_mask[:, None, :, None], weights, 0)


class TruncatedSVD(AbstractAttention):
    """Softmax attention with its matrix cut to its largest singular values.

    Args:
        rank: r, at least 1.
    """

    family = "low rank"
    budget = "rank"
    causal = False
    self_attention = True
    rows_independent = False

    def __init__(self, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}")
        self.rank = rank

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every singular value."""
        return {"rank": length}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """sigma_{r+1} |V|_2: row i of P - P_r is e_i^T (P - P_r), no longer than sigma_{r+1}. Round-off is added.

        The SVD is backward stable: round-off moves P_r by a small multiple of eps |P|_2, and |P|_2 <= sqrt(n).
        """
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            q, k, v = (torch.where(real, x, 0) for x in (q, k, v))
        n, eps = k.shape[2], torch.finfo(q.dtype).eps
        sigma = torch.linalg.svdvals(real_weights(q.double(), k.double(), key_padding_mask))
        cut = sigma[..., self.rank] if self.rank < n else torch.zeros_like(sigma[..., 0])
        reach = torch.linalg.matrix_norm(v.double(), ord=2)
        return ((cut + n * eps) * reach)[..., None].to(q.dtype) + softmax_round_off(q, k, v)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return svd_attention(q, k, v, self.rank, key_padding_mask)
