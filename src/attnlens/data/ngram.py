"""N-gram models of symbols: what counting alone predicts, the baseline of every language modeling table.

    p_m(w | h) = max(c(hw) - D(c(hw)), 0) / c(h) + backoff(h) p_{m-1}(w | h'),      p_0 = 1 / vocabulary_size

Interpolated Kneser-Ney with the three discounts of Chen and Goodman: D depends on whether a count is 1, 2 or more,
and is estimated from the counts of counts. The model of order n uses true counts at order n; below it a count is the
number of different symbols seen in front. Probabilities sum to one over the vocabulary for every history.

Cost: time O(S log S) for S training symbols per order, all in sorted integer arrays.

Reference: Chen, Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998,
https://dash.harvard.edu/handle/1/25104739.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NAMES = {1: "unigram", 2: "bigram", 3: "trigram", 4: "4-gram", 5: "5-gram"}

# For tables too small to estimate discounts from, with no count of 1, 2, 3 or 4 or a negative estimate: heuristic.
_FALLBACK_DISCOUNTS = (0.5, 0.75, 1.0)


class Table(NamedTuple):
    """Discounted counts of one order, looked up by bisection.

    Attributes:
        grams: sorted codes; the code of a gram is its symbols read as digits in base `vocabulary_size`.
        discounted: count less discount, for each gram.
        contexts: sorted codes of the grams less their last symbol.
        totals: count of each context.
        removed: sum of the discounts taken from each context, the mass that goes to the order below.
    """

    grams: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    removed: np.ndarray


class NGram(NamedTuple):
    """Tables of orders 1..n: true counts, and counts of different symbols in front (one order less)."""

    vocabulary_size: int
    true: tuple[Table, ...]
    continuation: tuple[Table, ...]


def fit(works: Sequence[np.ndarray], vocabulary_size: int, max_order: int) -> NGram:
    """Count the n-grams inside each work (1-D, symbols 0..vocabulary_size-1) up to `max_order`.

    Raises:
        ValueError: an order below 1, or so high that the code of a gram overflows 63 bits.
    """
    if max_order < 1 or vocabulary_size**max_order >= 2**63:
        raise ValueError(f"`max_order` is {max_order}: choose 1 or more, with vocabulary_size**max_order below 2**63")
    true, continuation = [], []
    for order in range(1, max_order + 1):
        codes = np.concatenate([_codes(work, vocabulary_size, order) for work in works])
        grams, counts = np.unique(codes, return_counts=True)
        true.append(_table(grams, counts, vocabulary_size))
        if order > 1:
            behind, in_front = np.unique(grams % vocabulary_size ** (order - 1), return_counts=True)
            continuation.append(_table(behind, in_front, vocabulary_size))
    return NGram(vocabulary_size, tuple(true), tuple(continuation))


def probabilities(model: NGram, work: np.ndarray, order: int) -> np.ndarray:
    """Probability of every symbol of `work` given the `order` - 1 before it, or as many as there are; float64.

    Raises:
        ValueError: the model was not fitted up to `order`.
    """
    if not 1 <= order <= len(model.true):
        raise ValueError(f"`order` is {order}: choose 1..{len(model.true)}")
    found = np.full(len(work), 1 / model.vocabulary_size)
    for level in range(1, order + 1):
        table = model.true[level - 1] if level == order else model.continuation[level - 1]
        codes = _codes(work, model.vocabulary_size, level)
        found[level - 1 :] = _interpolate(table, codes, model.vocabulary_size, found[level - 1 :])
    return found


def bits_per_symbol(
    train: Sequence[np.ndarray], test: Sequence[np.ndarray], targets: Sequence[np.ndarray], vocabulary_size: int
) -> dict[str, float]:
    """Mean of -log2 p over the test symbols where `targets` is True, for each order of `NAMES`.

    A target sees all of its work's text before it, across the borders of windows.
    """
    model = fit(train, vocabulary_size, max(NAMES))
    bits = {}
    for order, name in NAMES.items():
        costs = [-np.log2(probabilities(model, work, order)[at]) for work, at in zip(test, targets, strict=True)]
        bits[name] = float(np.concatenate(costs).mean())
    return bits


def _codes(work: np.ndarray, vocabulary_size: int, order: int) -> np.ndarray:
    """Codes of the grams ending at positions order-1, order, ... of `work`."""
    count = max(len(work) - order + 1, 0)
    codes = np.zeros(count, dtype=np.int64)
    for offset in range(order):
        codes = codes * vocabulary_size + work[offset : offset + count]
    return codes


def _table(grams: np.ndarray, counts: np.ndarray, vocabulary_size: int) -> Table:
    discounts = np.asarray(_discounts(counts))[np.minimum(counts, 3) - 1]
    contexts, first = np.unique(grams // vocabulary_size, return_index=True)
    totals = np.add.reduceat(counts, first) if len(first) else np.empty(0)
    removed = np.add.reduceat(discounts, first) if len(first) else np.empty(0)
    return Table(grams, counts - discounts, contexts, totals, removed)


def _discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """Discounts for counts 1, 2 and more, equation 26 of Chen and Goodman."""
    n1, n2, n3, n4 = (int((counts == value).sum()) for value in (1, 2, 3, 4))
    if 0 in (n1, n2, n3, n4):
        return _FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    # Without a positive discount there is no mass for what was not seen.
    return estimates if min(estimates) > 0 else _FALLBACK_DISCOUNTS


def _interpolate(table: Table, codes: np.ndarray, vocabulary_size: int, lower: np.ndarray) -> np.ndarray:
    """Probabilities at this order given those of the order below; a context never seen passes `lower` through."""
    gram, known_gram = _find(table.grams, codes)
    context, known_context = _find(table.contexts, codes // vocabulary_size)
    if not known_context.any():
        return lower
    totals = np.where(known_context, table.totals[context], 1.0)
    removed = np.where(known_context, table.removed[context], 1.0)
    return (np.where(known_gram, table.discounted[gram], 0.0) + removed * lower) / totals


def _find(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each wanted value in the sorted `values`, and whether it is there."""
    if len(values) == 0:
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    index = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return index, values[index] == wanted
