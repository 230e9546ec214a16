"""Match3: labels against the definition, equal shares for every token, splits that share nothing, baselines."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from attnlens.construct import construct
from attnlens.data.match3 import Match3, baselines, coincidence, match, num_distinct

SIZES = {"length": 10, "modulus": 71, "num_train": 400, "num_validation": 50, "num_test": 60, "seed": 0}


def test_a_label_says_whether_a_pair_completes_the_token():
    columns = Match3(**SIZES).prepare(Path()).splits["test"]
    for row, labels in zip(columns["input_ids"].tolist(), columns["labels"].tolist(), strict=True):
        for x, label in zip(row, labels, strict=True):
            assert label == any((x + y + z) % 71 == 0 for y in row for z in row)


def test_no_token_answers_itself():
    """3 x = 0 modulo a prime above 3 has no solution but 0, which is left out."""
    tokens = np.arange(1, 71)[:, None]
    assert match(tokens, 71).sum() == 0
    assert match(np.array([[1, 35]]), 71).tolist() == [[1, 1]]


def test_labels_are_balanced_whatever_the_own_token_is():
    """Multiplication by a unit keeps labels, exactly; their share is near 1/2 at the sizes of the config."""
    config = construct(OmegaConf.load("conf/data/match3.yaml"))
    train = config.prepare(Path()).splits["train"]
    inputs, labels, modulus = train["input_ids"][:500], train["labels"][:500], config.modulus
    assert set(np.unique(train["input_ids"])) == set(range(1, modulus))
    for unit in (2, 3, modulus - 1):
        assert np.array_equal(match(unit * inputs % modulus, modulus), labels)
    mean = train["labels"].mean()
    assert abs(mean - 0.5) < 0.03
    share = np.bincount(train["input_ids"].ravel(), train["labels"].ravel(), minlength=modulus)[1:]
    counts = np.bincount(train["input_ids"].ravel(), minlength=modulus)[1:]
    # Equal tokens of one sequence have equal labels: a factor 2 on the variance is more than they can add.
    assert (np.abs(share / counts - mean) < 5 * np.sqrt(2 * mean * (1 - mean) / counts)).all()


def test_baselines_are_what_their_rules_score():
    prepared = Match3(**SIZES).prepare(Path())
    train, test = prepared.splits["train"], prepared.splits["test"]
    assert num_distinct(np.array([[1, 2, 1, 5], [3, 3, 3, 3]])).tolist() == [3, 1]
    votes: dict[int, list[float]] = {}
    for row, labels in zip(train["input_ids"], train["labels"], strict=True):
        votes.setdefault(len(set(row.tolist())), []).extend(labels.tolist())
    majority = np.mean(train["labels"]) > 0.5
    right = told = 0
    for row, labels in zip(test["input_ids"], test["labels"], strict=True):
        own = votes.get(len(set(row.tolist())))
        right += (labels == majority).sum()
        told += (labels == (majority if own is None else np.mean(own) > 0.5)).sum()
    found = baselines(train, test, 71)
    assert found == prepared.meta.baselines
    assert found["majority"] == pytest.approx(right / test["labels"].size)
    assert found["distinct tokens"] == pytest.approx(told / test["labels"].size)


def test_the_rule_of_pairs_knows_matches_in_which_two_places_coincide():
    train = Match3(**SIZES).prepare(Path()).splits["train"]
    tokens, labels = train["input_ids"], train["labels"]
    found = coincidence(tokens, 71)
    for row, marks in zip(tokens[:50].tolist(), found[:50].tolist(), strict=True):
        for x, mark in zip(row, marks, strict=True):
            assert mark == any((2 * x + y) % 71 == 0 or (x + 2 * y) % 71 == 0 for y in row)
    assert (labels >= found).all()
    assert 0.2 < found.mean() < labels.mean()
    other = labels[found == 0].mean()
    assert other < 0.5
    test = Match3(**SIZES | {"num_test": 4000}).prepare(Path())
    hit = coincidence(test.splits["test"]["input_ids"], 71)
    assert test.meta.baselines["pairs"] == pytest.approx((test.splits["test"]["labels"] == hit).mean())


def test_splits_come_from_disjoint_streams_and_a_seed_repeats():
    first, again, other = (Match3(**SIZES | {"seed": seed}).prepare(Path()) for seed in (0, 0, 1))
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
        ({"modulus": 91}, "`modulus` is 91: choose a prime above 3"),
        ({"modulus": 3}, "`modulus` is 3: choose a prime above 3"),
        ({"num_test": 0}, "`num_test` is 0"),
    ],
)
def test_sizes_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Match3(**SIZES | change)
