"""Recall sequences: what is asked can be answered from the sequence, and splits share nothing."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from attnlens.construct import construct
from attnlens.data.mqar import MQAR, generate
from attnlens.data.store import IGNORED

SIZES = {
    "length": 64,
    "vocabulary_size": 128,
    "num_pairs": [8],
    "test_num_pairs": [4, 8, 16],
    "headline": 8,
    "power": 0.01,
    "num_train": 64,
    "num_validation": 32,
    "num_test": 16,
    "causal": False,
    "seed": 0,
}


def rows(inputs: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in inputs}


@pytest.mark.parametrize("num_pairs", [1, 4, 8, 16])
def test_every_pair_is_asked_for_once_and_the_label_is_its_value(num_pairs):
    inputs, labels = generate(
        np.random.default_rng(0), num_examples=50, length=64, vocabulary_size=128, num_pairs=num_pairs, power=0.01
    )
    for row, label in zip(inputs, labels, strict=True):
        pairs = dict(zip(row[0 : 2 * num_pairs : 2], row[1 : 2 * num_pairs : 2], strict=True))
        queries = np.flatnonzero(label != IGNORED)
        assert (queries >= 2 * num_pairs).all()
        assert sorted(row[queries]) == sorted(pairs)
        assert [pairs[key] for key in row[queries]] == list(label[queries])


def test_values_stand_nowhere_but_in_pairs_so_that_chance_is_exact():
    inputs, labels = generate(
        np.random.default_rng(1), num_examples=200, length=64, vocabulary_size=128, num_pairs=8, power=0.01
    )
    assert ((inputs >= 64).sum(axis=1) == 8).all()
    # Fillers are no stray queries: each of the 8 keys occurs in its pair and in its query, never elsewhere.
    keys = inputs[:, 0:16:2]
    occurrences = (inputs[:, :, None] == keys[:, None, :]).sum(axis=1)
    assert (occurrences == 2).all()
    assert set(np.unique(labels)) <= {IGNORED, *range(64, 128)}


def test_gaps_follow_the_power_law():
    """With one pair, slot s is drawn with probability (s + 1)^(power - 1) over their sum."""
    power, num_slots, draws = 0.5, 31, 40000
    _, labels = generate(
        np.random.default_rng(2), num_examples=draws, length=64, vocabulary_size=128, num_pairs=1, power=power
    )
    slots = ((labels != IGNORED).argmax(axis=1) - 2) // 2
    weights = np.arange(1, num_slots + 1) ** (power - 1)
    expected = draws * weights / weights.sum()
    found = np.bincount(slots, minlength=num_slots)
    # Five standard deviations of a binomial count.
    assert (np.abs(found - expected) < 5 * np.sqrt(expected)).all()


def test_splits_come_from_disjoint_streams(tmp_path):
    prepared = MQAR(**SIZES).prepare(tmp_path)
    seen = {split: rows(columns["input_ids"]) for split, columns in prepared.splits.items()}
    assert {split: len(columns["input_ids"]) for split, columns in prepared.splits.items()} == {
        "train": 64,
        "validation": 32,
        "test": 48,
    }
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_slices_count_the_queries(tmp_path):
    prepared = MQAR(**SIZES).prepare(tmp_path)
    test = prepared.splits["test"]
    assert ((test["labels"] != IGNORED).sum(axis=1) == test["slice"]).all()
    assert list(np.unique(test["slice"], return_counts=True)[1]) == [16, 16, 16]
    assert prepared.meta.slices == {"name": "num_pairs", "values": [4, 8, 16], "headline": 8}
    assert prepared.meta.chance == 1 / 8


def test_the_same_seed_repeats_and_another_does_not(tmp_path):
    first, again, other = (MQAR(**SIZES | {"seed": seed}).prepare(tmp_path) for seed in (0, 0, 1))
    for split in ("train", "validation", "test"):
        assert np.array_equal(first.splits[split]["input_ids"], again.splits[split]["input_ids"])
        assert not np.array_equal(first.splits[split]["input_ids"], other.splits[split]["input_ids"])


def test_mixed_training_lengths_are_shuffled(tmp_path):
    train = MQAR(**SIZES | {"num_pairs": [2, 16]}).prepare(tmp_path).splits["train"]
    assert ((train["labels"] != IGNORED).sum(axis=1) == train["slice"]).all()
    assert set(train["slice"][:32]) == {2, 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_num_pairs": [8, 17]}, "`num_pairs` is 17: choose 1..16"),
        ({"headline": 5}, "`headline` is 5"),
        ({"vocabulary_size": 33}, "`vocabulary_size` is 33"),
        ({"num_pairs": [0]}, "`num_pairs` is 0"),
        ({"num_train": 0}, "`num_train` is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**SIZES | change)


@pytest.mark.parametrize("name", ["mqar", "mqar_causal"])
def test_the_two_configs_differ_in_direction_only(name):
    config = OmegaConf.load(f"conf/data/{name}.yaml")
    other = OmegaConf.load("conf/data/mqar.yaml")
    assert construct(config).causal == (name == "mqar_causal")
    assert OmegaConf.merge(config, {"causal": False}) == other
