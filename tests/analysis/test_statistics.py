"""Intervals cover, tests keep their size, on synthetic studies whose truth is known."""

import numpy as np
import pytest

from attnlens.analysis.statistics import EQUAL, TOO_FEW, Interval, holm, interval, verdict


def study(generator, seeds, examples=60, *, effect=0.0, between_seeds=0.04, between_examples=0.3, noise=0.2, hard=None):
    """Scores (seeds, examples) of mean `effect`; `hard` is how hard each example is, for every method."""
    hard = generator.normal(0, between_examples, examples) if hard is None else hard
    seed_effects = generator.normal(0, between_seeds, (seeds, 1))
    return effect + hard + seed_effects + generator.normal(0, noise, (seeds, examples))


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize(("between_seeds", "between_examples"), [(0.05, 0.3), (0.05, 0.01), (0.0, 0.3)])
def test_interval_covers_the_mean_and_the_test_keeps_its_size(seeds, between_seeds, between_examples):
    """150 studies: 95 % intervals must cover in over 90 % of them, and tests at 5 % reject in under 8 %."""
    generator = np.random.default_rng(seeds)
    covered = rejected = 0
    for trial in range(150):
        hard = generator.normal(0, between_examples, 60)
        scores = study(generator, seeds, between_seeds=between_seeds, between_examples=between_examples)
        one, two = (study(generator, seeds, between_seeds=between_seeds, hard=hard) for _ in range(2))
        found = interval(scores, resamples=300, seed=trial)
        covered += found.low <= 0 <= found.high
        rejected += interval(one, two, resamples=300, seed=trial).p_value <= 0.05
    assert covered / 150 > 0.9
    assert rejected / 150 < 0.08


def test_pairing_by_example_finds_a_difference_that_the_intervals_hide():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 1, 200)
    one, two = (study(generator, 3, 200, effect=e, between_seeds=0.005, noise=0.05, hard=hard) for e in (0, 0.1))
    separate = interval(one), interval(two)
    assert separate[0].high > separate[1].low
    paired = interval(two, one)
    assert paired.low > 0
    assert paired.p_value < 0.01


def test_seeds_that_differ_widen_the_interval():
    scores = np.random.default_rng(0).normal(0.5, 0.1, (3, 100))
    calm, wild = interval(scores), interval(scores + np.array([[-0.2], [0.0], [0.2]]))
    assert wild.high - wild.low > 5 * (calm.high - calm.low)


def test_equal_scores_are_equal():
    scores = np.full((3, 50), 0.7)
    assert interval(scores, scores) == Interval(0.0, 0.0, 0.0, 1.0)


def test_the_same_call_gives_the_same_interval():
    scores = np.random.default_rng(0).normal(size=(3, 40))
    assert interval(scores) == interval(scores)
    assert interval(scores, seed=1) != interval(scores, seed=0)


def test_different_test_sets_cannot_be_paired():
    with pytest.raises(ValueError, match="`baseline` has 5 examples, `scores` 6"):
        interval(np.zeros((2, 6)), np.zeros((2, 5)))


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="`confidence` must lie between 0 and 1"):
        interval(np.zeros((2, 6)), **wrong)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("difference", "p_value", "seeds", "higher", "expected"),
    [
        (0.1, 0.01, 3, True, "better"),
        (0.1, 0.01, 3, False, "worse"),
        (-0.1, 0.01, 3, True, "worse"),
        (-0.1, 0.01, 3, False, "better"),
        (0.1, 0.2, 3, True, EQUAL),
        (0.005, 0.001, 3, True, EQUAL),
        (0.1, 0.01, 2, True, TOO_FEW),
    ],
)
def test_verdict(difference, p_value, seeds, higher, expected):
    found = Interval(difference, difference - 0.01, difference + 0.01, p_value)
    given = verdict(found, p_value, seeds=seeds, higher_is_better=higher, margin=0.01, level=0.05)
    assert given == expected
