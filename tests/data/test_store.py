"""Prepared folders: the same arrays give the same bytes, and what is damaged or ill-formed does not pass."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attnlens.data import store
from attnlens.data.store import IGNORED, Meta, Prepared, load_meta, load_split, save

META = Meta(
    task="tokens",
    objective="recall",
    causal=False,
    vocabulary_size=10,
    num_outputs=10,
    length=6,
    metric="accuracy",
    higher_is_better=True,
)


def columns(seed: int, size: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=(size, 6))
    labels[:, :3] = IGNORED
    return {"input_ids": rng.integers(10, size=(size, 6)), "labels": labels, "slice": np.arange(size)}


def example(**change: object) -> Prepared:
    splits = {split: columns(seed) for seed, split in enumerate(store.SPLITS)}
    return Prepared(splits, replace(META, **change), {"tokenizer.json": "{}"})


def test_what_was_saved_is_read_back(tmp_path):
    prepared = example()
    saved = save(prepared, tmp_path / "toy")
    assert load_meta(tmp_path / "toy") == saved
    assert (saved["data"], saved["sizes"]) == ("toy", {"train": 4, "validation": 4, "test": 4})
    for split in store.SPLITS:
        read = load_split(tmp_path / "toy", split)
        assert {name: column.dtype for name, column in read.items()} == dict.fromkeys(read, np.dtype(np.int32))
        assert all(np.array_equal(read[name], column) for name, column in prepared.splits[split].items())


def test_hugging_face_datasets_reads_the_folder(tmp_path):
    import datasets

    save(example(), tmp_path / "toy")
    dataset = datasets.load_from_disk(str(tmp_path / "toy" / "train"))
    assert dataset[0]["input_ids"] == columns(0)["input_ids"][0].tolist()
    assert dataset.features["labels"].length == 6


def test_equal_arrays_give_equal_bytes_and_others_do_not(tmp_path):
    first = save(example(), tmp_path / "a" / "toy")
    assert save(example(), tmp_path / "b" / "toy") == first
    changed = example()
    changed.splits["test"]["labels"][0, 5] ^= 1
    different = save(changed, tmp_path / "c" / "toy")
    assert different["files"]["test/data-00000-of-00001.arrow"] != first["files"]["test/data-00000-of-00001.arrow"]
    assert different["files"]["train/data-00000-of-00001.arrow"] == first["files"]["train/data-00000-of-00001.arrow"]


@pytest.mark.parametrize("name", ["train/data-00000-of-00001.arrow", "test/state.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_file_is_refused_by_its_hash(tmp_path, name, damage):
    save(example(), tmp_path / "toy")
    file = tmp_path / "toy" / name
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(ValueError, match=rf"{name}` is damaged: expected SHA-256 .*prepare.py data=toy"):
        load_meta(tmp_path / "toy")


@pytest.mark.parametrize("content", ["", '{"data": "toy"', "[]", '{"data": "toy"}'])
def test_a_damaged_meta_is_refused(tmp_path, content):
    save(example(), tmp_path / "toy")
    (tmp_path / "toy" / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta.json"):
        load_meta(tmp_path / "toy")


def test_a_missing_folder_names_the_command_and_what_is_there(tmp_path):
    save(example(), tmp_path / "toy")
    with pytest.raises(ValueError, match=r"prepare.py data=toi`; prepared so far: \['toy'\]"):
        load_meta(tmp_path / "toi")
    with pytest.raises(ValueError, match=r"`split` is 'dev': choose one of"):
        load_split(tmp_path / "toy", "dev")


def test_a_failure_on_the_way_leaves_the_earlier_folder(tmp_path, monkeypatch):
    earlier = save(example(), tmp_path / "toy")
    monkeypatch.setattr(store, "_hashes", lambda folder: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        save(example(length=6), tmp_path / "toy")
    assert load_meta(tmp_path / "toy") == earlier
    assert [path.name for path in Path(tmp_path).iterdir()] == ["toy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda splits: splits.pop("test"), "`splits` lacks \\['test'\\]"),
        (lambda splits: splits["train"].update(pixels=np.zeros(4)), "`train` has columns"),
        (lambda splits: splits["train"].pop("labels"), "`train` has columns"),
        (lambda splits: splits["train"].update(input_ids=np.zeros((4, 5))), "input_ids have shape"),
        (lambda splits: splits["train"].update(labels=np.zeros(4)), "labels have shape"),
        (lambda splits: splits["train"].update(slice=np.zeros(3)), "slice has 3 rows"),
        (lambda splits: splits["train"]["input_ids"].__setitem__((0, 0), 10), "input_ids` holds 0..10|holds .*..10"),
        (lambda splits: splits["train"]["labels"].__setitem__((0, 5), -1), "labels` holds -1"),
        (lambda splits: splits["train"]["labels"].fill(IGNORED), "labels` holds nothing"),
    ],
)
def test_ill_formed_data_is_refused_before_anything_is_written(tmp_path, change, message):
    prepared = example()
    change(prepared.splits)
    with pytest.raises(ValueError, match=message):
        save(prepared, tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def pairs(seed: int, size: int = 4, *, references: bool = True) -> dict[str, np.ndarray]:
    """Targets of 1 to 4 tokens 1..6 between begin 0 and end 0."""
    rng = np.random.default_rng(seed)
    targets, labels = np.zeros((size, 5), dtype=int), np.full((size, 5), IGNORED)
    for row in range(size):
        tokens = rng.integers(1, 7, size=rng.integers(1, 5))
        targets[row, 1 : len(tokens) + 1] = tokens
        labels[row, : len(tokens) + 1] = [*tokens, 0]
    columns = {"input_ids": rng.integers(10, size=(size, 6)), "target_ids": targets, "labels": labels}
    columns["attention_mask"] = np.ones((size, 6), dtype=int)
    if references:
        columns["references"] = np.stack([np.where(labels == 0, IGNORED, labels)] * 2, 1)
    return columns


def pair_example() -> Prepared:
    sizes = {"task": "seq2seq", "objective": "seq2seq", "num_outputs": 7, "target_length": 5, "begin": 0, "end": 0}
    splits = {split: pairs(seed, references=split != "train") for seed, split in enumerate(store.SPLITS)}
    return Prepared(splits, replace(META, **sizes, metric="phoneme_error_rate", higher_is_better=False))


def test_pairs_are_read_back(tmp_path):
    prepared = pair_example()
    save(prepared, tmp_path / "toy")
    for split in store.SPLITS:
        read = load_split(tmp_path / "toy", split)
        assert read.keys() == prepared.splits[split].keys()
        assert all(np.array_equal(read[name], column) for name, column in prepared.splits[split].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda splits: splits["train"].pop("target_ids"), "give target_ids"),
        (lambda splits: splits["train"].update(references=splits["test"]["references"]), "leave out references"),
        (lambda splits: splits["test"].pop("references"), "give references"),
        (lambda splits: splits["test"].update(references=splits["test"]["references"][:, 0]), "references have shape"),
        (lambda splits: splits["train"]["target_ids"].__setitem__((0, 0), 3), "must be `begin` 0"),
        (lambda splits: splits["train"].update(target_ids=splits["train"]["target_ids"][:, ::-1]), "must be `begin` 0"),
        (lambda splits: splits["train"]["target_ids"].__setitem__((0, 1), 7), "target_ids` holds 0..7"),
        (
            lambda splits: splits["train"]["labels"].__setitem__(splits["train"]["labels"] == 0, 1),
            "must end with `end` 0",
        ),
        (lambda splits: splits["train"].update(labels=splits["train"]["labels"][:, :4]), "task 'seq2seq' needs"),
        (lambda splits: splits["train"]["labels"].__setitem__(2, IGNORED), "must end with `end` 0"),
    ],
)
def test_ill_formed_pairs_are_refused(tmp_path, change, message):
    prepared = pair_example()
    change(prepared.splits)
    with pytest.raises(ValueError, match=message):
        save(prepared, tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_targets_belong_to_pairs_only(tmp_path):
    prepared = example()
    prepared.splits["train"]["target_ids"] = prepared.splits["train"]["labels"]
    with pytest.raises(ValueError, match="leave out target_ids for task 'tokens'"):
        save(prepared, tmp_path / "toy")
