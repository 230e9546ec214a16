"""Error rates against several references, beside the recursion written out."""

from functools import cache

import numpy as np
import pytest

from attnlens.data.edits import error_rates


def distance(first: tuple, second: tuple) -> int:
    """Levenshtein's recursion as it stands in the definition."""

    @cache
    def upto(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        replaced = upto(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(replaced, upto(i - 1, j) + 1, upto(i, j - 1) + 1)

    return upto(len(first), len(second))


def test_rates_are_those_of_the_nearest_reference():
    rng = np.random.default_rng(0)
    sequences = [[tuple(rng.integers(4, size=rng.integers(1, 7)).tolist()) for _ in range(4)] for _ in range(60)]
    found, references = [row[0] for row in sequences], [row[1 : 2 + index % 3] for index, row in enumerate(sequences)]
    nearest = [min(several, key=lambda one: distance(row, one)) for row, several in zip(found, references, strict=True)]
    edits = [distance(row, one) for row, one in zip(found, nearest, strict=True)]
    rates = error_rates(found, references)
    assert rates.scores.mean() == pytest.approx(sum(edits) / sum(map(len, nearest)))
    assert rates.wrong.tolist() == [count > 0 for count in edits]


def test_any_reference_met_is_right_and_none_found_costs_its_length():
    rates = error_rates([("K", "AE"), ()], [[("K", "EY", "T"), ("K", "AE")], [("B", "IY")]])
    assert rates.scores.tolist() == [0, 1]
    assert rates.wrong.tolist() == [False, True]


def test_symbols_longer_than_a_character_are_one_symbol():
    assert error_rates([("AA", "B")], [[("AE", "B")]]).scores.tolist() == [0.5]


@pytest.mark.parametrize(("found", "references"), [([("A",)], [[]]), ([], [])])
def test_nothing_to_compare_with_is_refused(found, references):
    with pytest.raises(ValueError, match="`references` must hold at least one"):
        error_rates(found, references)
