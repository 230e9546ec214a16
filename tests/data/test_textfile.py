"""A user's own text: parts in order, held-out text unseen, and words when the file is not there."""

import pytest

from attnlens.data.textfile import TextFile
from attnlens.data.tokens import Characters
from tests.data.corpus import WORKS


def text_file(path, **change: object) -> TextFile:
    arguments = {
        "path": None if path is None else str(path),
        "validation_fraction": 0.1,
        "test_fraction": 0.2,
        "tokenizer": Characters(),
        "length": 8,
        "max_validation_windows": 1000,
        "max_test_windows": 1000,
    }
    return TextFile(**arguments | change)


def test_the_parts_follow_each_other(tmp_path):
    text = "\n".join(WORKS.values())
    (tmp_path / "my.txt").write_text(text)
    prepared = text_file(tmp_path / "my.txt").prepare(tmp_path)
    encoder = Characters().fit([text])
    inputs = {split: columns["input_ids"].ravel().tolist() for split, columns in prepared.splits.items()}
    ids = encoder.encode(text)[0].tolist()
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert len(inputs[split]) == pytest.approx(share * len(text), abs=9)
    assert inputs["train"] == ids[: len(inputs["train"])]
    start = len(text) - int(len(text) * 0.2)
    assert inputs["test"] == ids[start : start + len(inputs["test"])]
    assert prepared.meta.baselines["bigram"] < prepared.meta.baselines["unigram"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": None}, "`path` is null"),
        ({"test_fraction": 0.0}, "`test_fraction` are 0.1, 0.0"),
        ({"test_fraction": 0.9}, "`test_fraction` are 0.1, 0.9"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        text_file(**{"path": "my.txt"} | change)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.txt is no file"):
        text_file(tmp_path / "nothing.txt").prepare(tmp_path)
