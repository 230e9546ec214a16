"""Held-out works are held out, and the corpus must be whole."""

import json

import pytest

from attnlens.data.fetch import fetch
from attnlens.data.integrity import sha256
from attnlens.data.shakespeare import Shakespeare
from attnlens.data.tokens import BytePairs, Characters
from tests.data.corpus import WORKS, source, write_archive


@pytest.fixture
def raw(tmp_path):
    archive = tmp_path / "plays-1.0.tar.gz"
    write_archive(archive)
    fetch(source(sha256(archive), archive=str(archive)), tmp_path / "raw" / "plays", tmp_path / "cache")
    return tmp_path / "raw"


def corpus(**change: object) -> Shakespeare:
    arguments = {
        "source": "plays",
        "validation": ["lear"],
        "test": ["macbeth"],
        "tokenizer": Characters(),
        "length": 16,
        "max_validation_windows": 5,
        "max_test_windows": 20,
    }
    return Shakespeare(**arguments | change)


def decode(prepared, split: str) -> list[str]:
    vocabulary = json.loads(prepared.files["tokenizer.json"])["model"]["vocab"]
    symbols = {index: symbol for symbol, index in vocabulary.items()}
    return ["".join(symbols[int(token)] for token in row) for row in prepared.splits[split]["input_ids"]]


def test_windows_come_from_the_works_of_their_split(raw):
    prepared = corpus().prepare(raw)
    assert all(window in WORKS["macbeth"] for window in decode(prepared, "test"))
    assert all(window in WORKS["lear"] for window in decode(prepared, "validation"))
    assert all(window in WORKS["hamlet"] or window in WORKS["tempest"] for window in decode(prepared, "train"))
    sizes = {split: len(columns["labels"]) for split, columns in prepared.splits.items()}
    train = sum((len(WORKS[name]) - 1) // 16 for name in ("hamlet", "tempest"))
    assert sizes == {"train": train, "validation": 5, "test": 20}


def test_the_metric_is_bits_per_character_with_every_baseline(raw):
    meta = corpus().prepare(raw).meta
    assert (meta.metric, meta.higher_is_better, meta.causal) == ("bits_per_character", False, True)
    assert list(meta.baselines) == ["unigram", "bigram", "trigram", "4-gram", "5-gram"]
    assert meta.baselines["5-gram"] < meta.baselines["unigram"]


def test_byte_pairs_are_learned_from_training_works_only(raw):
    """Other held-out works change the merges; other text inside the held-out works does not."""
    first = corpus(tokenizer=BytePairs(300)).prepare(raw)
    folder = raw / "plays"
    manifest = json.loads((folder / "manifest.json").read_text())
    held_out = folder / "macbeth_gut.txt"
    held_out.write_text("zyx " * 400)
    manifest["files"][held_out.name] = sha256(held_out)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    changed = corpus(tokenizer=BytePairs(300)).prepare(raw)
    assert changed.files == first.files
    assert corpus(tokenizer=BytePairs(300), test=["hamlet"]).prepare(raw).files != first.files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": ["othello"]}, r"\['othello'\], which are no works: choose from \['hamlet', 'lear'"),
        ({"test": ["lear"]}, r"share \['lear'\]"),
        ({"source": "poems"}, r"fetch.py source=poems"),
        ({"validation": ["hamlet", "tempest", "lear"]}, "leave no work to train on"),
    ],
)
def test_names_that_are_not_there_are_refused(raw, change, message):
    with pytest.raises(ValueError, match=message):
        corpus(**change).prepare(raw)
