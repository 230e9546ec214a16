"""Intervals and paired tests for scores that several seeds reach on one test set.

Scores are a matrix (seeds, examples): every seed's model answers the same examples. Two things vary, the seed of the
training and the draw of the test examples, so both are resampled, examples jointly for all seeds (the two-way
bootstrap of "The pigeonhole bootstrap", A. B. Owen, 2007). Of k seeds k - 1 are drawn, which makes the variance
unbiased ("Resampling inference with complex survey data", J. N. K. Rao and C. F. J. Wu, 1988): drawing k of k would
halve it at two seeds. With few seeds a normal-looking bootstrap is still too narrow, since the variance itself is
uncertain; its quantiles are therefore stretched from the normal's to Student's t with Satterthwaite's degrees of
freedom, after the expanded percentile interval of "What teachers should know about the bootstrap", T. Hesterberg, 2015.

With one seed the interval covers the draw of the examples only.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

# Below this many seeds no verdict is given: the spread between seeds cannot be told from two.
FEWEST_SEEDS = 3
TOO_FEW = "too few seeds"
EQUAL = "not distinguishable"


class Interval(NamedTuple):
    """A mean, its confidence interval, and the two-sided p-value of its being zero."""

    mean: float
    low: float
    high: float
    p_value: float


def interval(
    scores: Float[Array, "s e"],
    baseline: Float[Array, "z f"] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean score, or of its difference to `baseline`, paired by test example.

    Seeds of the two are not paired: equal seeds of different models share nothing that matters. Deterministic: the
    bootstrap draws from a generator of its own.

    Args:
        scores: one row a seed, one column a test example.
        baseline: scores of another method on the same examples.
        confidence: of the interval.
        resamples: of the bootstrap; no p-value is below 1 / (resamples + 1).
        seed: of the bootstrap.

    Raises:
        ValueError: the two were not tested on the same number of examples, or `confidence` or `resamples` is no such.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"`confidence` must lie between 0 and 1 and `resamples` be at least 1, got {confidence} and {resamples}"
        )
    others = [] if baseline is None else [baseline]
    if any(other.shape[1] != scores.shape[1] for other in others):
        raise ValueError(
            f"`baseline` has {others[0].shape[1]} examples, `scores` {scores.shape[1]}: "
            "retrain both on one test set with `dvc repro train`"
        )
    generator = np.random.default_rng([seed, 1])
    center = float(scores.mean() - sum(other.mean() for other in others))
    example_weights = _example_weights(scores.shape[1], resamples, seed)
    means = _resampled(generator, scores, example_weights)
    for other in others:
        means = means - _resampled(generator, other, example_weights)
    deviations = _stretch(np.sort(means - center), _degrees_of_freedom(scores, others))
    tail = (1 - confidence) / 2
    low, high = np.quantile(deviations, [tail, 1 - tail])
    return Interval(center, center + float(low), center + float(high), _p_value(center, deviations))


@lru_cache(maxsize=2)
def _example_weights(size: int, resamples: int, seed: int) -> Float[Array, "r e"]:
    """One draw serves every method on a test set: it is most of the work, and what pairs the methods."""
    weights = _weights(np.random.default_rng([seed, 0]), size, size, resamples)
    weights.flags.writeable = False
    return weights


def _weights(generator: np.random.Generator, size: int, drawn: int, resamples: int) -> Float[Array, "r n"]:
    """Shares of each of `size` things in resamples of `drawn` of them."""
    return generator.multinomial(drawn, np.full(size, 1 / size), size=resamples) / drawn


def _resampled(
    generator: np.random.Generator, scores: Float[Array, "s e"], example_weights: Float[Array, "r e"]
) -> Float[Array, " r"]:
    seeds, resamples = len(scores), len(example_weights)
    seed_weights = _weights(generator, seeds, max(seeds - 1, 1), resamples)
    return ((example_weights @ scores.T) * seed_weights).sum(1)


def _degrees_of_freedom(scores: Float[Array, "s e"], others: Sequence[Float[Array, "z e"]]) -> float:
    """Satterthwaite: (sum V)^2 / sum(V^2 / f) over the variances of seed means and of example means."""
    parts = []
    for group in (scores, *others):
        if len(group) > 1:
            parts.append((group.mean(1).var(ddof=1) / len(group), len(group) - 1))
    examples = scores.mean(0) - sum(other.mean(0) for other in others)
    if len(examples) > 1:
        parts.append((examples.var(ddof=1) / len(examples), len(examples) - 1))
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return np.inf
    return float(total**2 / sum(variance**2 / freedom for variance, freedom in parts))


def _stretch(deviations: Float[Array, " r"], freedom: float) -> Float[Array, " r"]:
    """Sorted deviations, each quantile multiplied by Student's over the normal's."""
    from scipy import stats

    levels = (np.arange(len(deviations)) + 0.5) / len(deviations)
    normal = stats.norm.ppf(levels)
    if not np.isfinite(freedom):
        return deviations
    near_median = np.abs(normal) < 1e-3
    factor = np.divide(stats.t.ppf(levels, freedom), normal, out=np.ones_like(normal), where=~near_median)
    return deviations * factor


def _p_value(center: float, deviations: Float[Array, " r"]) -> float:
    """Twice the share of the stretched distribution beyond zero; 1 where the two never differ."""
    values = center + deviations
    beyond = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(values) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: the chance of one false claim among them stays below the level.

    Source: "A simple sequentially rejective multiple test procedure", S. Holm, 1979.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(
    difference: Interval, p_value: float, *, seeds: int, higher_is_better: bool, margin: float, level: float
) -> str:
    """`better`, `worse`, `not distinguishable`, or `too few seeds`, from a difference to a baseline.

    Args:
        difference: method minus baseline.
        p_value: of the difference, adjusted for the number of comparisons.
        seeds: the smaller number of seeds of the two.
        higher_is_better: the direction of the metric.
        margin: differences up to it count as equal, however sure they are.
        level: largest p-value of a claim.
    """
    if seeds < FEWEST_SEEDS:
        return TOO_FEW
    if p_value > level or abs(difference.mean) <= margin:
        return EQUAL
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
