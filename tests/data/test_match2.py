"""Match2: labels against the definition, their balance against the formula, splits that share nothing."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from attnlens.construct import construct
from attnlens.data.match2 import Match2, baselines, match

SIZES = {"length": 20, "modulus": 29, "num_train": 400, "num_validation": 50, "num_test": 60, "seed": 0}


def test_a_label_says_whether_the_partner_is_there():
    prepared = Match2(**SIZES).prepare(Path())
    columns = prepared.splits["test"]
    for row, labels in zip(columns["input_ids"].tolist(), columns["labels"].tolist(), strict=True):
        for x, label in zip(row, labels, strict=True):
            assert label == any((x + y) % 29 == 0 for y in row)


def test_no_token_is_its_own_partner():
    inputs = Match2(**SIZES).prepare(Path()).splits["train"]["input_ids"]
    assert set(np.unique(inputs)) == set(range(1, 29))
    assert ((2 * inputs) % 29 != 0).all()
    assert match(np.array([[3, 5, 7]]), 29).sum() == 0


def test_labels_are_balanced_whatever_the_own_token_is():
    """P(label = 1) = 1 - (1 - 1/(M - 1))^(n - 1) for every token, near 1/2 at the sizes of the config."""
    config = construct(OmegaConf.load("conf/data/match2.yaml"))
    expected = 1 - (1 - 1 / (config.modulus - 1)) ** (config.length - 1)
    assert abs(expected - 0.5) < 0.005
    train = config.prepare(Path()).splits["train"]
    share = np.bincount(train["input_ids"].ravel(), train["labels"].ravel(), minlength=config.modulus)[1:]
    share = share / np.bincount(train["input_ids"].ravel(), minlength=config.modulus)[1:]
    # Of one sequence the labels of equal tokens are equal: about 1.3 of a kind where there is one, hence the factor 2.
    allowed = 5 * np.sqrt(2 * expected * (1 - expected) * 92 / train["labels"].size)
    assert np.abs(share - expected).max() < allowed


def test_baselines_are_what_their_rules_score():
    prepared = Match2(**SIZES).prepare(Path())
    test = prepared.splits["test"]
    majority = int(prepared.splits["train"]["labels"].mean() > 0.5)
    right, told = 0, 0
    for row, labels in zip(test["input_ids"], test["labels"], strict=True):
        right += (labels == majority).sum()
        told += (labels == ((len(set(row)) - 1) / 27 > 0.5)).sum()
    found = baselines(prepared.splits["train"], test, 29)
    assert found == prepared.meta.baselines
    assert found["majority"] == pytest.approx(right / labels.size / len(test["labels"]))
    assert found["distinct tokens"] == pytest.approx(told / labels.size / len(test["labels"]))


def test_the_number_of_distinct_tokens_gives_the_probability_that_is_claimed():
    """Among 4000 sequences, by their number d of distinct tokens: P(label = 1) = (d - 1) / (M - 2)."""
    inputs = np.random.default_rng(1).integers(1, 29, size=(4000, 20))
    labels = match(inputs, 29)
    distinct = np.array([len(set(row)) for row in inputs])
    for d in (13, 14, 15):
        per_sequence = labels[distinct == d].mean(axis=1)
        error = per_sequence.std() / np.sqrt(len(per_sequence))
        assert abs(per_sequence.mean() - (d - 1) / 27) < 5 * error


def test_splits_come_from_disjoint_streams_and_a_seed_repeats():
    first, again, other = (Match2(**SIZES | {"seed": seed}).prepare(Path()) for seed in (0, 0, 1))
    rows = {name: {row.tobytes() for row in columns["input_ids"]} for name, columns in first.splits.items()}
    assert {name: len(found) for name, found in rows.items()} == {"train": 400, "validation": 50, "test": 60}
    assert not rows["train"] & rows["validation"]
    assert not rows["train"] & rows["test"]
    for split in rows:
        assert np.array_equal(first.splits[split]["labels"], again.splits[split]["labels"])
        assert not np.array_equal(first.splits[split]["input_ids"], other.splits[split]["input_ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 1}, "`length` is 1: choose 2 or more"),
        ({"modulus": 30}, "`modulus` is 30: choose an odd number"),
        ({"modulus": 1}, "`modulus` is 1: choose an odd number"),
        ({"num_test": 0}, "`num_test` is 0"),
    ],
)
def test_sizes_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Match2(**SIZES | change)
