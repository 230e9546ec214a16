"""Genres: labels are those of the works, inputs those of the masked windows, and held-out works teach nothing."""

import json

import numpy as np
import pytest

from attnlens.data.genre import Genre
from attnlens.data.integrity import sha256
from attnlens.data.masked import Masked
from attnlens.data.store import save
from tests.data.test_shakespeare import corpus, decode, raw  # noqa: F401 - a fixture

GENRES = {"tragedy": ["hamlet", "lear", "macbeth"], "comedy": ["tempest", "twelfth_night", "errors"]}


@pytest.fixture
def works(raw):  # noqa: F811
    """Two works of each genre beside those of the corpus, so that each split can have both."""
    folder = raw / "plays"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, word in (("twelfth_night", "sings"), ("errors", "sing so")):
        file = folder / f"{name}_gut.txt"
        file.write_text(f"{word} and sing\n" * 60)
        manifest["files"][file.name] = sha256(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return raw


def genre(**change: object) -> Genre:
    held_out = corpus(validation=["lear", "errors"], test=["macbeth", "twelfth_night"])
    return Genre(**{"corpus": held_out, "genres": GENRES, "max_train_windows": 40, **change})


def test_labels_are_the_genres_of_the_works(works):
    prepared = genre().prepare(works)
    for split, tragedy, comedy in (("validation", "lear", "errors"), ("test", "macbeth", "twelfth_night")):
        texts = {name: (works / "plays" / f"{name}_gut.txt").read_text() for name in (tragedy, comedy)}
        labels = prepared.splits[split]["labels"]
        assert set(labels.tolist()) == {0, 1}
        for window, label in zip(decode(prepared, split), labels, strict=True):
            assert window in texts[comedy if label else tragedy]
    assert len(prepared.splits["train"]["labels"]) == 40


def test_symbols_are_those_of_the_masked_windows(works, tmp_path):
    labeled = genre(max_train_windows=10_000).prepare(works)
    masked = Masked(genre().corpus, fraction=0.2, draws=1, seed=0).prepare(works)
    assert labeled.files == masked.files
    assert labeled.meta.vocabulary_size == masked.meta.vocabulary_size
    assert len(labeled.splits["train"]["labels"]) == len(masked.splits["train"]["labels"])
    save(labeled, tmp_path / "toy")


def test_baselines_know_training_windows_only(works):
    """Comedies here share their words and tragedies theirs, so n-grams tell them apart; the majority is one class."""
    prepared = genre().prepare(works)
    train, test = (prepared.splits[split]["labels"] for split in ("train", "test"))
    majority = np.bincount(train).argmax()
    majority_rate = (test == majority).mean()
    assert prepared.meta.baselines["majority"] == pytest.approx(majority_rate)
    assert prepared.meta.baselines["character n-grams"] > 0.8 > majority_rate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genres": {**GENRES, "history": ["lear"]}}, r"`genres` lists \['lear'\] more than once"),
        ({"max_train_windows": 1}, "`max_train_windows` is 1: choose 2"),
        ({"genres": {"tragedy": ["hamlet", "lear", "macbeth"], "comedy": ["tempest"]}}, "`genres` lacks"),
        ({"genres": {**GENRES, "history": ["john"]}}, r"`genres` \['history'\] have no window in"),
    ],
)
def test_bad_genres_are_refused(works, change, message):
    with pytest.raises(ValueError, match=message):
        genre(**change).prepare(works)
