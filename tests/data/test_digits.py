"""Digits: the images are scikit-learn's, split in proportion and without overlap."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from attnlens.construct import construct
from attnlens.data.digits import Digits, split


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return construct(OmegaConf.load("conf/data/digits.yaml")).prepare(tmp_path_factory.mktemp("raw"))


def test_the_three_splits_make_up_all_images(prepared):
    from sklearn.datasets import load_digits

    images = load_digits()
    parts = [np.column_stack([part["input_ids"], part["labels"]]) for part in prepared.splits.values()]
    assert sorted(map(bytes, np.concatenate(parts))) == sorted(
        map(bytes, np.column_stack([images.data, images.target]).astype(np.int64))
    )
    assert {name: len(part["labels"]) for name, part in prepared.splits.items()} == {
        "validation": 180,
        "test": 360,
        "train": 1257,
    }


def test_classes_are_in_proportion(prepared):
    for part in prepared.splits.values():
        shares = np.bincount(part["labels"], minlength=10) / len(part["labels"])
        assert np.abs(shares - 0.1).max() < 0.01


def test_baselines_are_those_of_pixels(prepared):
    assert prepared.meta.baselines["majority"] == pytest.approx(0.1, abs=0.01)
    assert 0.94 < prepared.meta.baselines["logistic_regression"] < 0.99


def test_the_split_is_fixed_by_its_seed():
    labels = np.arange(200) % 10
    first, again, other = (split(labels, (20, 40), seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])
    assert sorted(np.concatenate(first)) == list(range(200))


def test_splits_that_lose_a_class_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`num_validation`, `num_test` are"):
        Digits(num_validation=5, num_test=360, seed=0).prepare(tmp_path)
