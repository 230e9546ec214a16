"""k-hop induction heads: labels against a literal search, their balance, what a window can know."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from attnlens.construct import construct
from attnlens.data.khop import KHop, find, hop, sequences, within
from attnlens.data.store import IGNORED

SIZES = {
    "length": 30,
    "num_symbols": 6,
    "num_hops": 2,
    "num_train": 200,
    "num_validation": 50,
    "num_test": 60,
    "seed": 0,
}


def search(row, i):
    """The largest j <= i with x_{j-1} = x_i, or -1; positions from 0."""
    return max((j for j in range(1, i + 1) if row[j - 1] == row[i]), default=-1)


@pytest.mark.parametrize("num_hops", [1, 2, 3])
def test_labels_are_those_of_a_literal_search(num_hops):
    inputs = sequences(np.random.default_rng(0), 40, 30, 6)
    labels = hop(inputs, 6, num_hops)
    for row, found in zip(inputs, labels, strict=True):
        for i in range(30):
            place = i
            for _ in range(num_hops):
                place = search(row, place) if place >= 0 else -1
            assert found[i] == (IGNORED if place < 0 else row[place])
    assert (labels == IGNORED).any()
    assert (labels != IGNORED).any()


def test_a_sequence_by_hand():
    """b a c b a: the last b is followed by what followed the first, a; the last a by c."""
    row = np.array([[1, 0, 2, 1, 0]])
    assert find(row, 3).tolist() == [[-1, -1, -1, 1, 2]]
    assert hop(row, 3, 1).tolist() == [[IGNORED, IGNORED, IGNORED, 0, 2]]
    assert (hop(row, 3, 2) == IGNORED).all()


def test_labels_do_not_depend_on_what_follows():
    inputs = sequences(np.random.default_rng(0), 20, 30, 6)
    for stop in (1, 7, 29):
        assert np.array_equal(hop(inputs[:, :stop], 6, 2), hop(inputs, 6, 2)[:, :stop])


def test_neighbors_differ_and_symbols_and_labels_are_uniform():
    """Every ordered pair of different symbols is as frequent as any other, as neighbors and as (token, label)."""
    draws, count = 4000, 6
    inputs = sequences(np.random.default_rng(2), draws, 30, count)
    assert (inputs[:, 1:] != inputs[:, :-1]).all()
    labels = hop(inputs, count, 1)
    for left, right in ((inputs[:, 0], inputs[:, 1]), (inputs[:, 29], labels[:, 29])):
        asked = right != IGNORED
        pairs = np.bincount(left[asked] * count + right[asked], minlength=count**2).reshape(count, count)
        assert (np.diag(pairs) == 0).all()
        expected = asked.sum() / (count * (count - 1))
        off = pairs[~np.eye(count, dtype=bool)]
        assert np.abs(off - expected).max() < 5 * np.sqrt(expected)


def test_a_window_knows_its_hops_and_names_its_first_token_otherwise():
    inputs = sequences(np.random.default_rng(3), 50, 30, 6)
    total = []
    for row in inputs.tolist():
        scores = []
        for i in range(30):
            place = search(row, i)
            if place >= 0:
                window = row[max(0, i - 4) : i + 1]
                guess = row[place] if window[-1] in window[:-1] else window[0]
                scores.append(guess == row[place])
        total.append(np.mean(scores))
    assert within(inputs, 6, 1, reach=5) == pytest.approx(np.mean(total))
    assert within(inputs, 6, 1, reach=1) == 0
    assert within(inputs, 6, 1, reach=30) == 1


def test_no_rule_on_the_last_tokens_beats_the_baseline():
    """The most frequent label for every pattern of the last three tokens, counted on the very sequences it is scored
    on, is right as often as the rule, within what counting overfits."""
    inputs = sequences(np.random.default_rng(5), 6000, 30, 4)
    labels = hop(inputs, 4, 1)
    pattern = (inputs[:, 18:-2] * 16 + inputs[:, 19:-1] * 4 + inputs[:, 20:]).ravel()
    found = labels[:, 20:].ravel()
    asked = found != IGNORED
    counts = np.zeros((64, 4), dtype=int)
    np.add.at(counts, (pattern[asked], found[asked]), 1)
    best = counts.max(axis=1).sum() / asked.sum()
    rule = np.where(inputs[:, 18:-2] == inputs[:, 20:], inputs[:, 19:-1], inputs[:, 18:-2]).ravel()
    assert best == pytest.approx((rule == found)[asked].mean(), abs=0.005)


def test_meta_states_chance_and_the_window():
    prepared = KHop(**SIZES).prepare(Path())
    assert prepared.meta.chance == 1 / 5
    assert prepared.meta.causal
    found = within(prepared.splits["test"]["input_ids"], 6, 2, reach=5)
    assert prepared.meta.baselines == {"last 5 tokens": found}
    config = construct(OmegaConf.load("conf/data/khop.yaml"))
    # What models are asked of the config's sequences: most positions have an answer.
    inputs = sequences(np.random.default_rng(4), 200, config.length, config.num_symbols)
    assert (hop(inputs, config.num_symbols, config.num_hops) != IGNORED).mean() > 0.6


def test_splits_come_from_disjoint_streams_and_a_seed_repeats():
    first, again, other = (KHop(**SIZES | {"seed": seed}).prepare(Path()) for seed in (0, 0, 1))
    rows = {name: {row.tobytes() for row in columns["input_ids"]} for name, columns in first.splits.items()}
    assert {name: len(found) for name, found in rows.items()} == {"train": 200, "validation": 50, "test": 60}
    assert not rows["train"] & rows["validation"]
    assert not rows["train"] & rows["test"]
    for split in rows:
        assert np.array_equal(first.splits[split]["labels"], again.splits[split]["labels"])
        assert not np.array_equal(first.splits[split]["input_ids"], other.splits[split]["input_ids"])


@pytest.mark.parametrize(
    ("name", "value", "least"), [("length", 2, 3), ("num_symbols", 2, 3), ("num_hops", 0, 1), ("num_train", 0, 1)]
)
def test_sizes_out_of_range_are_refused(name, value, least):
    with pytest.raises(ValueError, match=f"`{name}` is {value}: choose {least} or more"):
        KHop(**SIZES | {name: value})
