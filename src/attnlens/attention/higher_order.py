"""Higher order attention (HOT): on a grid, one softmax matrix a mode from queries and keys pooled over the others.

    out = (S_1 (x) ... (x) S_m) V,   S_i = softmax(s Qp_i Kp_i^T),   s = 1/sqrt(d),

Qp_i (N_i x d) the mean of the queries over all modes but i, Kp_i that of the keys. Padding is left out of the means,
and P, the softmax of the summed logits, is taken over the real cells alone. Time O(n (N1 + ... + Nm) dv + n d), memory
O(n d + N1^2 + ... + Nm^2), and n (N1 + ... + Nm) numbers more where cells are masked.

A mean of logits is the logit of the means, s <Qp_1(r), Kp_1(r')> = mean_{c,c'} s_(r,c),(r',c'). On a full grid the
summed logits are therefore, up to a constant, those sums f(r, r') + g(c, c') which come nearest to the logits in least
squares: P is the softmax of the additive part of the logits. It equals softmax attention where the logits are additive,
and where the grid is one row (`num_columns` >= n). With the rest e_ij of the logits, and by `linalg.kronecker`,

    |out_i - softmax_i| <= tanh((max_j e_ij - min_j e_ij) / 4) diam(V).

Not causal: the pools read the whole sequence.

Source: "Higher Order Transformers: Efficient Attention Mechanism for Tensor Structured Data" (Omranpour, Rabusseau,
Rabbany, 2024), https://arxiv.org/abs/2412.02919. Departures: a head is one Kronecker product, so that its rows sum to
one, where the paper sums over heads; the output projection, with a block for every head, is that of the model. Means by
default; with sums (`sum_pooling`) logits are the prod_{j != i} N_j^2-fold and additive logits are not met.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.grid import fixed_modes, grid_shape, real_cells, to_grid, to_sequence
from attnlens.linalg.kronecker import kronecker_attention, kronecker_bound


def pooled(
    x: Float[Tensor, "b h *grid d"], real: Bool[Tensor, "#b *grid"] | None, mode: int, sum_pooling: bool
) -> Float[Tensor, "b h _ d"]:
    """The mean, or the sum, of the real cells over all modes but one; cells without a token hold zeros."""
    modes = x.ndim - 3
    others = [axis for axis in range(modes) if axis != mode]
    if not others:
        return x
    total = x.sum([2 + axis for axis in others])
    if sum_pooling:
        return total
    if real is None:
        return total / (x.shape[2:-1].numel() / x.shape[2 + mode])
    return total / real.sum([1 + axis for axis in others]).clamp_min(1).to(x.dtype)[:, None, :, None]


def pooled_logits(
    q: Float[Tensor, "b h *grid d"],
    k: Float[Tensor, "b h *grid d"],
    real: Bool[Tensor, "#b *grid"] | None,
    sum_pooling: bool,
) -> list[Float[Tensor, "b h _ _"]]:
    """s Qp_i Kp_i^T for every mode."""
    pools = [[pooled(x, real, mode, sum_pooling) for x in (q, k)] for mode in range(q.ndim - 3)]
    return [of_q @ of_k.mT * q.shape[-1] ** -0.5 for of_q, of_k in pools]


class HigherOrder(AbstractAttention):
    """Kronecker attention with pooled queries and keys.

    Args:
        num_columns: length of a row, at least 1.
        num_rows: rows of a sheet, for a grid of three modes; None for two.
        sum_pooling: sums instead of means.
    """

    family = "tensor"
    causal = False
    self_attention = True
    row_stochastic = True
    rows_independent = False

    def __init__(self, num_columns: int, num_rows: int | None = None, sum_pooling: bool = False) -> None:
        super().__init__()
        self.fixed = fixed_modes(num_columns, num_rows)
        self.sum_pooling = sum_pooling

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With one row."""
        return {"num_columns": length}

    def logits(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        key_padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> list[Float[Tensor, "b h _ _"]]:
        """The terms of the logits, one a mode; padded queries and keys are zero."""
        shape = grid_shape(q.shape[2], self.fixed)
        real = real_cells(q.shape[2], shape, key_padding_mask, q.device)
        return pooled_logits(to_grid(q, shape), to_grid(k, shape), real, self.sum_pooling)

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """The bound above from the dense logits: analysis."""
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            q, k, v = (torch.where(real, x, 0) for x in (q, k, v))
        return kronecker_bound(self.logits(q, k, key_padding_mask), q, k, v, self.fixed, key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        n = q.shape[2]
        shape = grid_shape(n, self.fixed)
        real = real_cells(n, shape, key_padding_mask, q.device)
        return to_sequence(kronecker_attention(self.logits(q, k, key_padding_mask), to_grid(v, shape), real), n)
