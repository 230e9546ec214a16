"""Mode-wise attention on a folded sequence: one softmax matrix a mode from whole slices of queries and keys.

    out = (S_1 (x) ... (x) S_m) V,   S_i = softmax(Q_(i) K_(i)^T / sqrt(d N / N_i)),

Q_(i) the unfolding of the queries, an N1 x ... x Nm x d tensor with N cells, along mode i: a row is a slice of the
sequence with all that it holds as its features. A logit is <Q(r,.), K(r',.)> = sum_c <q_(r,c), k_(r',c)>, which
compares tokens at equal places of two slices only. Padding adds nothing, the scale counts the places real in both, and
P, the softmax of the summed logits, is taken over the real cells alone.

Time O(n (N1 + ... + Nm)(d + dv)), memory O(n d + N1^2 + ... + Nm^2), and n (N1 + ... + Nm) numbers more where cells are
masked. Equals softmax attention with one row (`num_columns` >= n). With `average`, logits are the mean over the places
rather than their sum over its root: additive logits f(r, r') + g(c, c') on a full grid are then met exactly as well,
while random ones shrink by sqrt(N / N_i). The error is bounded by the rest of the logits as in `higher_order`, which
averages over all pairs of places and so leaves the smallest rest in the root mean square.

Not causal: a slice of the future is a feature of the whole past.

Source: "Long Sequence Modeling with Attention Tensorization: From Sequence to Tensor Learning" (Feng, Ying, Tassiulas,
2024), https://arxiv.org/abs/2410.20926, known here from its abstract and its figure of the method. Departures: length
and padding as above; the scale, that of dot products of d N / N_i features, is ours; no causal form.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.grid import fixed_modes, grid_shape, real_cells, to_grid, to_sequence
from attnlens.linalg.kronecker import kronecker_attention, kronecker_bound


def unfolding(x: Float[Tensor, "b h *grid d"], mode: int) -> Float[Tensor, "b h _ _"]:
    """X_(i): the slices along a mode as rows."""
    return x.movedim(2 + mode, 2).flatten(3)


def unfolded_logits(
    q: Float[Tensor, "b h *grid d"],
    k: Float[Tensor, "b h *grid d"],
    real: Bool[Tensor, "#b *grid"] | None,
    average: bool,
) -> list[Float[Tensor, "b h _ _"]]:
    """Q_(i) K_(i)^T and its scale for every mode; cells without a token hold zeros."""
    logits = []
    for mode in range(q.ndim - 3):
        scores = unfolding(q, mode) @ unfolding(k, mode).mT * q.shape[-1] ** -0.5
        if real is None:
            places = q.shape[2:-1].numel() // q.shape[2 + mode]
            logits.append(scores / (places if average else places**0.5))
        else:
            member = unfolding(real[:, None, ..., None].to(q.dtype), mode)
            places = (member @ member.mT).clamp_min(1)
            logits.append(scores / (places if average else places.sqrt()))
    return logits


class Modewise(AbstractAttention):
    """Kronecker attention with unfolded queries and keys.

    Args:
        num_columns: length of a row, at least 1.
        num_rows: rows of a sheet, for a grid of three modes; None for two.
        average: logits are means over the places of a slice.
    """

    family = "tensor"
    causal = False
    self_attention = True
    row_stochastic = True
    rows_independent = False

    def __init__(self, num_columns: int, num_rows: int | None = None, average: bool = False) -> None:
        super().__init__()
        self.fixed = fixed_modes(num_columns, num_rows)
        self.average = average

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
        return unfolded_logits(to_grid(q, shape), to_grid(k, shape), real, self.average)

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """tanh((max_j e_ij - min_j e_ij) / 4) diam(V), e the logits less the sum of the terms; dense: analysis."""
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
