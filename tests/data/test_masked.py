"""Masked tokens: how many are hidden and how, that draws differ, and the baselines by counting by hand."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from attnlens.data.masked import Masked, baselines, hide
from attnlens.data.store import IGNORED, save
from tests.data.test_shakespeare import corpus, raw  # noqa: F401 - a fixture

SIZE = 50


@pytest.fixture
def windows():
    return np.random.default_rng(0).integers(SIZE, size=(2000, 20))


def test_the_shares_of_the_three_kinds(windows):
    hidden = hide(windows, 0.15, SIZE, np.random.default_rng(1))
    inputs, labels = hidden["input_ids"], hidden["labels"]
    asked = labels != IGNORED
    assert (asked.sum(1) == 3).all()
    assert np.array_equal(inputs[~asked], windows[~asked])
    assert np.array_equal(labels[asked], windows[asked])
    masked, same = inputs[asked] == SIZE, inputs[asked] == labels[asked]
    # Of 6000 labels; a falsified token is the true one by chance in 1 of SIZE cases. Four standard errors.
    assert masked.mean() == pytest.approx(0.8, abs=4 * (0.16 / 6000) ** 0.5)
    assert same.mean() == pytest.approx(0.1 + 0.1 / SIZE, abs=4 * (0.09 / 6000) ** 0.5)
    places = asked.sum(0)
    assert abs(places - 300).max() < 4 * (300 * 0.85) ** 0.5


def test_draws_hide_other_places_and_the_seed_fixes_them(raw, tmp_path):  # noqa: F811
    def prepared(seed: int):
        return Masked(corpus(), fraction=0.15, draws=3, seed=seed).prepare(raw)

    first, other = prepared(0), prepared(1)
    train = first.splits["train"]
    text = np.where(train["labels"] == IGNORED, train["input_ids"], train["labels"])
    parts = np.split(text, 3)
    assert all(np.array_equal(parts[0], part) for part in parts)
    asked = np.split(train["labels"] != IGNORED, 3)
    same = np.mean((asked[0] == asked[1]).all(1))
    assert same < 0.05
    assert np.array_equal(train["labels"], prepared(0).splits["train"]["labels"])
    assert not np.array_equal(train["labels"], other.splits["train"]["labels"])
    saved = save(first, tmp_path / "toy")
    assert saved["vocabulary_size"] == saved["num_outputs"] + 1
    assert saved["sources"]["mask"] == saved["num_outputs"]


def test_windows_are_those_of_the_corpus(raw):  # noqa: F811
    masked = Masked(corpus(), fraction=0.2, draws=1, seed=0).prepare(raw).splits
    plain = corpus().prepare(raw).splits
    for split, columns in masked.items():
        shown = columns["labels"] == IGNORED
        assert np.array_equal(columns["input_ids"][shown], plain[split]["input_ids"][shown])


def by_hand(train: np.ndarray, test: dict[str, np.ndarray], sides: str) -> float:
    """Accuracy of the most frequent token in a context, with dictionaries."""
    tables: dict = defaultdict(Counter)
    for row in train.tolist():
        for before, token, after in zip(row, row[1:], row[2:], strict=False):
            tables["left", before][token] += 1
            tables["both", before, after][token] += 1
    whole = Counter(train.ravel().tolist())
    right = []
    for inputs, labels in zip(test["input_ids"].tolist(), test["labels"].tolist(), strict=True):
        ends = [SIZE, *inputs, SIZE]
        for place, label in enumerate(labels):
            if label == IGNORED:
                continue
            keys = [("left", ends[place])] if sides == "left" else []
            keys = [("both", ends[place], ends[place + 2]), ("left", ends[place])] if sides == "both" else keys
            table = next((tables[key] for key in keys if key in tables), whole)
            right.append(min(table, key=lambda token: (-table[token], token)) == label)
    return float(np.mean(right))


def test_baselines_are_counts(windows):
    skewed = windows // 5
    test = hide(skewed[:200], 0.15, SIZE, np.random.default_rng(2))
    found = baselines(skewed[200:], test, SIZE)
    assert found["majority"] == pytest.approx(by_hand(skewed[200:], test, ""))
    assert found["left neighbor"] == pytest.approx(by_hand(skewed[200:], test, "left"))
    assert found["both neighbors"] == pytest.approx(by_hand(skewed[200:], test, "both"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.01}, "`fraction` is 0.01: hide 1 .. 15"),
        ({"fraction": 1.0}, "`fraction` is 1.0: hide 1 .. 15"),
        ({"draws": 0}, "`draws` is 0: choose 1"),
    ],
)
def test_bad_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Masked(**{"corpus": corpus(), "fraction": 0.15, "draws": 1, "seed": 0, **change})
