"""What is measured on one captured layer for one operator argument: one record a head, averaged over draws."""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnlens.analysis import error, frontier
from attnlens.analysis.capture import Capture
from attnlens.attention import AbstractAttention

# Distances on P below this share are round-off of float32, and a ratio to them means nothing.
ROUND_OFF = 1e-5

Record = dict[str, float | int | None]


def measure(draws: Sequence[AbstractAttention], capture: Capture, flops: int) -> list[Record]:
    """Errors of an operator, given as its draws, against float64 exact attention; and the oracles at `flops`.

    Args:
        draws: the operator, built from one seed or from several.
        capture: the layer.
        flops: counted cost of one forward at batch 1, all heads.

    Returns:
        one record a head; a value that is not finite or has no meaning is None.
    """
    with torch.no_grad():
        runs = [_errors(operator, capture) for operator in draws]
        oracles = _oracles(capture, flops / capture.q.shape[1])
    return [_record([run[head] for run in runs], oracles[head]) for head in range(capture.q.shape[1])]


def _errors(operator: AbstractAttention, capture: Capture) -> list[dict[str, float | int]]:
    """Every measure of one draw, a head."""
    (q, k, v), rows = capture.inputs, capture.key_padding_mask
    exact = capture.exact
    out = operator(q, k, v, **capture.masks)
    weights = operator.matrix(q, k, **capture.masks)
    measured = {
        "error": error.relative_error(out, exact.out, rows),
        "max_row_error": error.max_row_error(out, exact.out, rows),
        "operator_norm_error": error.operator_norm_error(out, exact.out, capture.scale, rows),
        "sink_removed_error": error.sink_removed_error(weights, exact.weights, v, rows),
        "row_sum_defect": error.row_sum_defect(weights, rows),
        "negative_mass": error.negative_mass(weights, rows),
        "total_variation": error.total_variation(weights, exact.weights, rows),
        "distance": frontier.distance(weights, exact),
        "visited": error.visited_fraction(weights, exact.weights, rows),
        "error_mean_v": capture.baseline,
    }
    measured["error_target"] = (
        measured["error"] if operator.target == "softmax" else _target_error(operator, capture, out)
    )
    if operator.row_stochastic:
        measured["kl"] = error.kl_divergence(weights, exact.weights, rows)
    return [{name: values[head] for name, values in measured.items()} for head in range(q.shape[1])]


def _target_error(operator: AbstractAttention, capture: Capture, out: Tensor) -> list[float]:
    reference = operator.reference(*(x.double() for x in capture.inputs), **capture.masks)
    return error.relative_error(out, reference, capture.key_padding_mask)


def _oracles(capture: Capture, flops: float) -> list[dict[str, float | int]]:
    """The best rank-r and k-sparse approximations whose application costs `flops` a head."""
    exact, visible = capture.exact, capture.visible
    dim, value_dim = capture.q.shape[-1], capture.v.shape[-1]
    rank = frontier.affordable_rank(flops, len(visible), len(visible), value_dim)
    k = frontier.affordable_k(flops, visible, dim, value_dim)
    values = {
        "rank_r_error": frontier.rank_r_error(exact, rank),
        "top_k_error": frontier.top_k_error(exact, k),
        "top_k_remainder_error": frontier.top_k_remainder_error(exact, k),
        "rank_r_distance": frontier.rank_r_distance(exact, rank),
        "top_k_total_variation": frontier.top_k_total_variation(exact, k),
        "scale": error.frobenius(exact.weights),
    }
    heads = range(capture.q.shape[1])
    return [{"rank": rank, "k": k} | {name: value[head] for name, value in values.items()} for head in heads]


def _record(runs: Sequence[Mapping[str, float | int]], oracle: Mapping[str, float | int]) -> Record:
    """Means over draws beside the oracles, as one record."""
    means = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
    distance, variation = means.pop("distance"), means["total_variation"]
    record: Record = {"kl": None, **means, "draws": len(runs)}
    record["skill"] = error.ratio(means["error"], means["error_mean_v"])
    record["error_std"] = statistics.stdev(run["error"] for run in runs) if len(runs) > 1 else 0.0
    for name in ("rank", "k", "rank_r_error", "top_k_error", "top_k_remainder_error"):
        record[name] = oracle[name]
    low_rank = distance > ROUND_OFF * oracle["scale"]
    record["optimality_low_rank"] = oracle["rank_r_distance"] / distance if low_rank else None
    # Without a single key there is no row to compare: an empty one has half the variation of a wrong one.
    sparse = variation > ROUND_OFF and oracle["k"] > 0
    record["optimality_top_k"] = oracle["top_k_total_variation"] / variation if sparse else None
    return {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}
