"""How the error of an operator falls with its budget: on Gaussian inputs, at several logit scales, over draws.

Budgets are in the operator's own units (features, landmarks, keys a block) and double. Errors are relative Frobenius
errors against the operator's own target, root mean squares over draws: of the output, and of the kernel estimate that
it normalizes where that is declared unbiased. The log-log slope is fitted at the smallest logit scale, where a declared
order is asymptotic, to the kernel if there is one; at larger scales the curves stand as they are, beside the error of
mean(V).
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnlens.analysis.budget import exact_flops, operator_flops
from attnlens.analysis.declared import is_learned, is_randomized
from attnlens.attention import AbstractAttention, build
from attnlens.linalg.dense import mean_values

# Errors below are round-off in float64: the operator is exact there, and a slope through them means nothing.
ROUND_OFF = 1e-9


class Ensemble(NamedTuple):
    """Gaussian inputs of one example, and the budgets tried on them.

    length, head_dim, num_heads: of the inputs.
    logit_scales: standard deviations of <q, k>/sqrt(d), growing.
    arguments: budgets, growing; those are tried that cost at most `most` times exact attention's FLOPs.
    asymptotic: the smallest argument that the slope is fitted to.
    draws: seeds of a randomized operator.
    seed: of the inputs.
    """

    length: int
    head_dim: int
    num_heads: int
    logit_scales: tuple[float, ...]
    arguments: tuple[int, ...]
    most: float
    asymptotic: int
    draws: int
    seed: int


def ensemble(settings: Mapping) -> Ensemble:
    """Settings as conf/ holds them.

    Raises:
        ValueError: a setting that is missing, unknown, or leaves nothing to measure.
    """
    if set(settings) != set(Ensemble._fields):
        raise ValueError(f"`analysis` must set {list(Ensemble._fields)}, got {sorted(settings)}")
    lists = {name: tuple(settings[name]) for name in ("logit_scales", "arguments")}
    found = Ensemble(**{**settings, **lists})
    for name in ("logit_scales", "arguments"):
        axis = getattr(found, name)
        if not axis or list(axis) != sorted(set(axis)) or axis[0] <= 0:
            raise ValueError(f"`{name}` must be growing positive numbers, got {axis}")
    if min(found.length, found.head_dim, found.num_heads, found.draws) < 1:
        raise ValueError("`length`, `head_dim`, `num_heads` and `draws` must be at least 1")
    return found


def converge(config: Mapping, on: Ensemble, progress: Callable[[str], None] = print) -> dict:
    """Curves and slope of one operator, as results/converge/<attention>.json holds them."""
    operator = _build(config, on)
    result = {
        "family": operator.family,
        "target": operator.target,
        "budget": operator.budget,
        "order": operator.order,
        "randomized": is_randomized(operator),
        "kernel": operator.unbiased,
        "reason": _reason(operator),
        "ensemble": on._asdict(),
    }
    if result["reason"] is not None:
        return result | {"points": [], "null": [], "slope": None}
    points: list[dict] = []
    for scale in on.logit_scales:
        progress(f"converge: logit scale {scale:g}")
        points += _curve(config, on, scale)
    return result | {"points": points, "null": _null(operator, on), "slope": _slope(points, on)}


def summarize(result: Mapping) -> dict[str, float]:
    """The fitted slope, and the output error at the largest budget of every logit scale."""
    last = {f"error/{point['logit_scale']:g}": point["error"] for point in result["points"]}
    slope = {} if result["slope"] is None else {"slope": result["slope"]["slope"]}
    return {name: value for name, value in (slope | last).items() if value is not None}


def gaussian_inputs(on: Ensemble, logit_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit Gaussian q, k, v in float64, q and k scaled so that logits have the standard deviation `logit_scale`."""
    generator = torch.Generator().manual_seed(on.seed)
    shape = 3, 1, on.num_heads, on.length, on.head_dim
    q, k, v = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return q * logit_scale**0.5, k * logit_scale**0.5, v


def _build(config: Mapping, on: Ensemble, seed: int = 0, **budget: int) -> AbstractAttention:
    sizes = {"head_dim": on.head_dim, "num_heads": on.num_heads, "max_length": on.length}
    return build(config, **sizes, seed=seed, layer=0, **budget).double().eval()


def _reason(operator: AbstractAttention) -> str | None:
    if operator.budget is None:
        return "no budget to choose"
    if operator.arity > 1:
        return "weighs tuples of tokens: exact attention on the same inputs has no cost to compare with"
    if is_learned(operator):
        return "learned: its error is that of its training"
    return None


def _curve(config: Mapping, on: Ensemble, scale: float) -> Iterator[dict]:
    """One record a budget that the operator admits."""
    q, k, v = gaussian_inputs(on, scale)
    name = _build(config, on).budget
    assert name is not None
    exact = exact_flops(q, k, v, causal=False)
    for argument in on.arguments:
        try:
            first = _build(config, on, **{name: argument})
            flops = operator_flops(first, q, k, v, causal=False)
        except ValueError:
            continue
        if flops > on.most * exact:
            break
        seeds = range(1, on.draws) if is_randomized(first) else ()
        draws = [first, *(_build(config, on, seed=seed, **{name: argument}) for seed in seeds)]
        yield {"logit_scale": scale, "argument": argument, "achieved": flops / exact} | _errors(draws, q, k, v)


def _errors(draws: Sequence[AbstractAttention], q: Tensor, k: Tensor, v: Tensor) -> dict[str, object]:
    """Root mean squares over draws, and the relative error of every draw."""
    with torch.no_grad():
        exact = draws[0].reference(q, k, v)
        output = [_relative(operator(q, k, v), exact) for operator in draws]
        kernel: list[float] | None = None
        if draws[0].unbiased:
            target = draws[0].kernel_target(q, k)
            kernel = [_relative(operator.kernel(q, k), target) for operator in draws]
    return {
        "error": _root_mean_square(output),
        "error_min": _finite(min(output)),
        "error_max": _finite(max(output)),
        "kernel_error": None if kernel is None else _root_mean_square(kernel),
        "fitted_draws": [_finite(value) for value in (output if kernel is None else kernel)],
    }


def _null(operator: AbstractAttention, on: Ensemble) -> list[dict]:
    """Error of mean(V) against the operator's target at every logit scale."""
    null = []
    for scale in on.logit_scales:
        q, k, v = gaussian_inputs(on, scale)
        exact = operator.reference(q, k, v)
        null.append(
            {
                "logit_scale": scale,
                "error": _finite(
                    _relative(mean_values(v, causal=False, key_padding_mask=None).expand_as(exact), exact)
                ),
            }
        )
    return null


def _slope(points: Sequence[Mapping], on: Ensemble) -> dict | None:
    """Log-log slope at the smallest logit scale with its jackknife standard error; None below three usable budgets."""
    usable = [
        point
        for point in points
        if point["logit_scale"] == on.logit_scales[0]
        and point["argument"] >= on.asymptotic
        and all(error is not None and error > ROUND_OFF for error in point["fitted_draws"])
    ]
    if len(usable) < 3:
        return None
    x = [math.log(point["argument"]) for point in usable]
    draws = [point["fitted_draws"] for point in usable]

    def fit(left_out: int | None) -> float:
        kept = [[e for i, e in enumerate(errors) if i != left_out] for errors in draws]
        y = [math.log(math.sqrt(statistics.fmean(e**2 for e in errors))) for errors in kept]
        return statistics.linear_regression(x, y).slope

    count = len(draws[0])
    error = None
    if count > 1:
        slopes = [fit(i) for i in range(count)]
        error = math.sqrt((count - 1) / count * sum((s - statistics.fmean(slopes)) ** 2 for s in slopes))
    of = "output" if usable[0]["kernel_error"] is None else "kernel"
    return {"of": of, "slope": fit(None), "standard_error": error, "arguments": [p["argument"] for p in usable]}


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def _root_mean_square(errors: Sequence[float]) -> float | None:
    return _finite(math.sqrt(statistics.fmean(error**2 for error in errors)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
