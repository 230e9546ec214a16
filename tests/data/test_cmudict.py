"""The dictionary: families on one side, targets one behind their labels, all pronunciations kept."""

import json

import numpy as np
import pytest

from attnlens.data import cmudict
from attnlens.data.cmudict import BOUNDARY, LETTERS, CMUDict
from attnlens.data.integrity import sha256
from attnlens.data.store import IGNORED, load_split, save
from attnlens.files import write_json

STEMS = [a + b + c for a in "bdfglmnprt" for b in "aeiou" for c in "bdgklmnpt"]
TEXT = "\n".join(
    [
        *(f"{stem} {stem[0].upper()} AH1 {stem[2].upper()}" for stem in STEMS),
        *(f"{stem}{end} {stem[0].upper()} AH1 {stem[2].upper()} Z" for stem in STEMS[::3] for end in ("s", "'s")),
        *(f"{stem}(2) {stem[0].upper()} EH0 {stem[2].upper()} # a remark" for stem in STEMS[::2]),
        "bab(3) B AH0 B",
        "3d TH R IY1 D IY1",
        "a.d. EY1 D IY1",
        "verylongwordindeed V EH1 R IY0",
    ]
)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw" / "cmudict"
    folder.mkdir(parents=True)
    (folder / "cmudict.dict").write_text(TEXT)
    write_json(folder / "manifest.json", {"sha256": "0", "files": {"cmudict.dict": sha256(folder / "cmudict.dict")}})
    return folder.parent


def data(**change: object) -> CMUDict:
    sizes = {"max_letters": 8, "max_phonemes": 6, "num_validation": 30, "num_test": 60, "seed": 0}
    return CMUDict(**{"source": "cmudict", "stress": False, **sizes, **change})


def words(prepared, split: str) -> list[str]:
    rows = prepared.splits[split]["input_ids"]
    return ["".join(LETTERS[index - 1] for index in row if index) for row in rows]


def phonemes(prepared, row: np.ndarray) -> tuple[str, ...]:
    names = json.loads(prepared.files["symbols.json"])["outputs"]
    return tuple(names[index] for index in row if index not in (IGNORED, BOUNDARY))


def test_families_stay_together_and_sizes_are_met(raw):
    prepared = data().prepare(raw)
    parts = {split: set(words(prepared, split)) for split in prepared.splits}
    assert (len(parts["validation"]), len(parts["test"])) == (30, 60)
    assert len(set.union(*parts.values())) == len(STEMS) + 2 * len(STEMS[::3])
    for stem in STEMS[::3]:
        assert sum(bool({stem, f"{stem}s", f"{stem}'s"} & part) for part in parts.values()) == 1


@pytest.mark.parametrize(
    ("word", "stem"),
    [("cats", "cat"), ("cat's", "cat"), ("cats'", "cat"), ("boxes", "box"), ("cities", "city"), ("gas", "gas")],
)
def test_families(word, stem):
    assert cmudict.family(word, dict.fromkeys(["cat", "cats", "box", "city", "gas", word], ())) == stem


def test_examples_are_the_dictionarys_lines(raw):
    prepared = data().prepare(raw)
    dictionary = cmudict.read(TEXT, stress=False)
    pairs = list(zip(words(prepared, "train"), prepared.splits["train"]["labels"], strict=True))
    assert {(word, phonemes(prepared, row)) for word, row in pairs} == {
        (word, sound) for word in words(prepared, "train") for sound in dictionary[word]
    }
    test = prepared.splits["test"]
    for word, label, several in zip(words(prepared, "test"), test["labels"], test["references"], strict=True):
        assert [phonemes(prepared, row) for row in several if (row != IGNORED).any()] == dictionary[word]
        assert phonemes(prepared, label) == dictionary[word][0]
    assert "references" not in prepared.splits["train"]


def test_equal_pronunciations_count_once_and_stress_is_an_option():
    assert cmudict.read(TEXT, stress=False)["bab"] == [("B", "AH", "B"), ("B", "EH", "B")]
    assert cmudict.read(TEXT, stress=True)["bab"] == [("B", "AH1", "B"), ("B", "EH0", "B"), ("B", "AH0", "B")]
    assert not {"3d", "a.d."} & set(cmudict.read(TEXT, stress=False))


def test_what_is_too_long_is_left_out_and_the_store_takes_the_rest(raw, tmp_path):
    prepared = data().prepare(raw)
    assert "verylongwordindeed" not in words(prepared, "train")
    saved = save(prepared, tmp_path / "prepared" / "toy")
    assert (saved["length"], saved["target_length"]) == (8, 7)
    for split in prepared.splits:
        read = load_split(tmp_path / "prepared" / "toy", split)
        assert all(np.array_equal(read[name], column) for name, column in prepared.splits[split].items())
        assert np.array_equal(read["attention_mask"] == 1, read["input_ids"] != 0)


def test_the_baseline_reads_the_training_words_only(raw):
    """Test words said in a way of their own are not foreseen, where the same way in training would be."""
    first = data().prepare(raw)
    assert first.meta.baselines["letter contexts"] < 0.1
    held_out = set(words(first, "test"))
    lines = [f"{line.split()[0]} ZH OY1 ZH" if line.split()[0] in held_out else line for line in TEXT.splitlines()]
    lines = [line for line in lines if line.split("(")[0] not in held_out or "ZH" in line]
    file = raw / "cmudict" / "cmudict.dict"
    file.write_text("\n".join(lines))
    write_json(raw / "cmudict" / "manifest.json", {"sha256": "0", "files": {file.name: sha256(file)}})
    changed = data().prepare(raw)
    assert set(words(changed, "test")) == held_out
    assert changed.meta.baselines["letter contexts"] > 0.9
    assert changed.meta.word_baselines["letter contexts"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_test": 0}, "`num_test` is 0: choose 1"),
        ({"max_letters": 0}, "`max_letters` is 0: choose 1"),
        ({"num_test": 10_000}, "`num_validation`, `num_test` are \\(30, 10000\\), which leaves none"),
        ({"source": "cmu"}, "fetch.py source=cmu"),
    ],
)
def test_bad_sizes_are_refused(raw, change, message):
    with pytest.raises(ValueError, match=message):
        data(**change).prepare(raw)
