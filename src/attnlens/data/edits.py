"""Error rates of sequences against several references each.

    edits(x) = min over references r of the Levenshtein distance of x and r;   the shortest distance counts
    phoneme error rate = sum edits / sum of the lengths of the references that were nearest
    word error rate = share of examples with edits > 0

An example's score is its edits over the mean length of the nearest references, so that the mean of scores is the rate
of the whole set and examples can be resampled.

Source: Levenshtein, "Binary codes capable of correcting deletions, insertions, and reversals", 1966; the distance is
computed by `torchmetrics`.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Rates(NamedTuple):
    """Each example's part in the two rates; the rates are their means.

    scores: (examples,) float64, edits over the mean length of the nearest references.
    wrong: (examples,) bool, whether no reference was met.
    """

    scores: np.ndarray
    wrong: np.ndarray


def error_rates(found: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Sequence[Hashable]]]) -> Rates:
    """Score sequences of symbols, each against all of its references; the nearest counts, the first of equals.

    Raises:
        ValueError: an example without a reference, or no example.
    """
    if not found or not all(references):
        raise ValueError("`references` must hold at least one sequence for each of at least one example")
    edits, lengths = np.zeros(len(found)), np.zeros(len(found))
    pairs = [(row, one) for row, several in enumerate(references) for one in several]
    distances = _distances([found[row] for row, _ in pairs], [one for _, one in pairs])
    edits.fill(np.inf)
    for (row, one), distance in zip(pairs, distances, strict=True):
        if distance < edits[row]:
            edits[row], lengths[row] = distance, len(one)
    return Rates(edits / lengths.mean(), edits > 0)


def _distances(found: Sequence[Sequence[Hashable]], wanted: Sequence[Sequence[Hashable]]) -> list[int]:
    """`torchmetrics` compares strings: every symbol becomes a character."""
    from torchmetrics.functional.text import edit_distance

    symbols = {symbol for sequence in (*found, *wanted) for symbol in sequence}
    character = {symbol: chr(index) for index, symbol in enumerate(symbols)}
    first, second = ([_joined(sequence, character) for sequence in side] for side in (found, wanted))
    return edit_distance(first, second, reduction="none").tolist()


def _joined(sequence: Sequence[Hashable], character: dict[Hashable, str]) -> str:
    return "".join(character[symbol] for symbol in sequence)
