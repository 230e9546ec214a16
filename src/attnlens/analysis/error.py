"""Errors of an attention operator against exact attention: tensors to plain numbers, one a head.

Y = P V is the exact output, Y~ = P~ V the operator's; sums run over the examples of the batch and over the real query
rows only (`rows`, True = real; None = all). A padded row may hold anything, NaN included. Computed in float64.
A ratio 0/0 is 0: what is exactly right has no error, even where there is nothing to be right about.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator, with 0/0 = 0 and x/0 = inf."""
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return numerator / denominator


def _real_rows(x: Float[Tensor, "b h n x"], rows: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b h n x"]:
    """`x` in float64 with padded rows at zero."""
    x = x.double()
    return x if rows is None else torch.where(rows[:, None, :, None], x, 0.0)


def _row_means(per_row: Float[Tensor, "b h n"], rows: Bool[Tensor, "b n"] | None) -> list[float]:
    """Mean over the real rows of the batch, a head."""
    count = per_row.shape[0] * per_row.shape[2] if rows is None else max(int(rows.sum()), 1)
    return (per_row.sum((0, 2)) / count).tolist()


def frobenius(x: Float[Tensor, "b h n x"], rows: Bool[Tensor, "b n"] | None = None) -> list[float]:
    """‖X‖_F a head, over the batch."""
    return _real_rows(x, rows).square().sum((0, 2, 3)).sqrt().tolist()


def relative_error(
    out: Float[Tensor, "b h n x"], exact: Float[Tensor, "b h n x"], rows: Bool[Tensor, "b n"] | None = None
) -> list[float]:
    """‖Y~ - Y‖_F / ‖Y‖_F a head, over the batch."""
    difference = _real_rows(out, rows) - _real_rows(exact, rows)
    return [ratio(a, b) for a, b in zip(frobenius(difference), frobenius(exact, rows), strict=True)]


def mean_value(
    v: Float[Tensor, "b h m x"], *, causal: bool, key_padding_mask: Bool[Tensor, "b m"] | None = None
) -> Float[Tensor, "b h m x"]:
    """Output of the operator that knows nothing: the mean of the visible real values, one row a token, in float64."""
    values = _real_rows(v, key_padding_mask)
    real = torch.ones_like(values[..., :1]) if key_padding_mask is None else key_padding_mask[:, None, :, None].double()
    if causal:
        return values.cumsum(2) / real.cumsum(2).clamp_min(1)
    return (values.sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)).expand_as(values)


def row_sum_defect(weights: Float[Tensor, "b h n m"], rows: Bool[Tensor, "b n"] | None = None) -> list[float]:
    """max_i |sum_j P~_ij - 1| a head."""
    defect = (weights.double().sum(-1) - 1).abs()
    return _real_rows(defect[..., None], rows).amax((0, 2, 3)).tolist()


def negative_mass(weights: Float[Tensor, "b h n m"], rows: Bool[Tensor, "b n"] | None = None) -> list[float]:
    """Mean over rows of sum_j max(-P~_ij, 0), a head."""
    return _row_means(_real_rows(weights, rows).clamp_max(0).neg().sum(-1), rows)


def visited_fraction(
    weights: Float[Tensor, "b h n m"], exact: Float[Tensor, "b h n m"], rows: Bool[Tensor, "b n"] | None = None
) -> list[float]:
    """Entries of P~ that are not zero over entries of P that are not zero, a head."""
    used = (_real_rows(weights, rows) != 0).sum((0, 2, 3)).tolist()
    visible = (_real_rows(exact, rows) != 0).sum((0, 2, 3)).tolist()
    return [ratio(float(a), float(b)) for a, b in zip(used, visible, strict=True)]


def total_variation(
    weights: Float[Tensor, "b h n m"], exact: Float[Tensor, "b h n m"], rows: Bool[Tensor, "b n"] | None = None
) -> list[float]:
    """Mean over rows of sum_j |P~_ij - P_ij| / 2, a head; for rows that do not sum to one it may exceed 1."""
    difference = _real_rows(weights, rows) - _real_rows(exact, rows)
    return _row_means(difference.abs().sum(-1) / 2, rows)


def kl_divergence(
    weights: Float[Tensor, "b h n m"], exact: Float[Tensor, "b h n m"], rows: Bool[Tensor, "b n"] | None = None
) -> list[float]:
    """Mean over rows of KL(P~_i ‖ P_i) in nats, a head, for stochastic rows.

    This direction is finite for every method that looks at visible keys only; the other is infinite as soon as one
    key is dropped. Infinite where P~ puts mass on a key that P gives none.
    """
    approximate, reference = _real_rows(weights, rows), _real_rows(exact, rows)
    return _row_means((torch.xlogy(approximate, approximate) - torch.xlogy(approximate, reference)).sum(-1), rows)


def max_row_error(
    out: Float[Tensor, "b h n x"], exact: Float[Tensor, "b h n x"], rows: Bool[Tensor, "b n"] | None = None
) -> list[float]:
    """max_i |Y~_i - Y_i| / max_i |Y_i| in Euclidean norm, a head, over the batch."""
    worst = (_real_rows(out, rows) - _real_rows(exact, rows)).norm(dim=-1).amax((0, 2)).tolist()
    largest = _real_rows(exact, rows).norm(dim=-1).amax((0, 2)).tolist()
    return [ratio(a, b) for a, b in zip(worst, largest, strict=True)]


def operator_scale(
    weights: Float[Tensor, "b h n m"], v: Float[Tensor, "b h m x"], rows: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "b h"]:
    """‖P‖ ‖V‖ in operator norm. `rows` masks keys as well: queries and keys are the same tokens."""
    return torch.linalg.matrix_norm(_real_rows(weights, rows), ord=2) * torch.linalg.matrix_norm(
        _real_rows(v, rows), ord=2
    )


def operator_norm_error(
    out: Float[Tensor, "b h n x"],
    exact: Float[Tensor, "b h n x"],
    scale: Float[Tensor, "b h"],
    rows: Bool[Tensor, "b n"] | None = None,
) -> list[float]:
    """max over examples of ‖Y~ - Y‖ / (‖P‖ ‖V‖) in operator norm, a head; `scale` from `operator_scale`.

    The measure of "HyperAttention" (Han et al., 2023) and "KDEformer" (Zandieh et al., 2023).
    """
    difference = torch.linalg.matrix_norm(_real_rows(out, rows) - _real_rows(exact, rows), ord=2)
    return torch.where(difference == 0, 0.0, difference / scale).amax(0).tolist()


def sink_removed_error(
    weights: Float[Tensor, "b h n m"],
    exact: Float[Tensor, "b h n m"],
    v: Float[Tensor, "b h m x"],
    rows: Bool[Tensor, "b n"] | None = None,
) -> list[float]:
    """Relative output error after the value of the sink is put to zero, a head.

    The sink of an example is the key with the largest column sum of P. Its column often carries most of ‖Y‖ and is
    easily right, which hides what a method does to the rest. `rows` masks keys too (self-attention).
    """
    approximate, reference = _real_rows(weights, rows), _real_rows(exact, rows)
    sink = reference.sum(2).argmax(-1)[:, :, None, None]
    values = _real_rows(v, rows).scatter(2, sink.expand(-1, -1, 1, v.shape[-1]), 0.0)
    return relative_error(approximate @ values, reference @ values)
