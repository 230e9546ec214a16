"""Prepared data on disk: Hugging Face `datasets` folders for three splits beside one `meta.json` that vouches for them.

The bytes are a function of the arrays alone, so that DVC sees no change where there is none: the fingerprint which
`datasets` writes into its state file is the hash of the columns, and rows are laid down in one shard per split.
`meta.json` holds the SHA-256 of every other file; a folder that does not match is refused before anything is read.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from attnlens.data.integrity import sha256, verify
from attnlens.files import atomic, read_json, write_json

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
COLUMNS = ("input_ids", "labels", "attention_mask", "slice", "target_ids", "references")
IGNORED = -100


@dataclass(frozen=True)
class Meta:
    """What a model, a metric and a report need to know about a data set.

    Attributes:
        task: "tokens" has one label a position (`IGNORED` where there is none), "classification" one an example,
            "seq2seq" one a position of the target.
        objective: what is asked of the model, for the report's words.
        causal: whether the task is void if position t sees positions after t.
        vocabulary_size, num_outputs: inputs lie in [0, vocabulary_size), labels and targets in [0, num_outputs).
        length: tokens in an example.
        target_length: tokens in its target, the one that begins or ends it included; for "seq2seq" only.
        begin, end: the tokens that begin `target_ids` and end `labels`.
        metric, higher_is_better: what a cell reports.
        chance: the metric's value under informed guessing, None where the baselines say it better.
        baselines: the metric's value on the test split for models that are no attention.
        word_baselines: their word error rates, where the metric is an error rate of parts of words.
        characters_per_token: of the test labels; bits per character = nats per token / ln 2 / this number.
        spelling: by split, the bits per character that spelling its unknown words adds to those of the tokens.
        slices: {"name": what the `slice` column counts, "values": all of them, "headline": the one reported}.
        sources: where the content comes from, with hashes.
    """

    task: Literal["tokens", "classification", "seq2seq"]
    objective: Literal["recall", "next_token", "masked_token", "classification", "seq2seq"]
    causal: bool
    vocabulary_size: int
    num_outputs: int
    length: int
    metric: Literal["accuracy", "bits_per_character", "phoneme_error_rate"]
    higher_is_better: bool
    target_length: int | None = None
    begin: int | None = None
    end: int | None = None
    chance: float | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    word_baselines: Mapping[str, float] | None = None
    characters_per_token: float | None = None
    spelling: Mapping[str, float] | None = None
    slices: Mapping[str, object] | None = None
    sources: Mapping[str, object] = field(default_factory=dict)


class Prepared(NamedTuple):
    """A data set in memory: columns of each split, its description, and further text files to keep beside it."""

    splits: Mapping[str, Mapping[str, np.ndarray]]
    meta: Meta
    files: Mapping[str, str] = {}


def save(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Write `prepared` as `folder`, whole or not at all, and return the content of its `meta.json`."""
    _check(prepared)
    with atomic(folder) as aside:
        aside.mkdir()
        for split in SPLITS:
            _dataset(prepared.splits[split], split).save_to_disk(str(aside / split), num_shards=1)
        for name, text in prepared.files.items():
            (aside / name).write_text(text, encoding="utf-8")
        meta = {"data": folder.name, **asdict(prepared.meta), "sizes": _sizes(prepared), "files": _hashes(aside)}
        write_json(aside / "meta.json", meta)
    return meta


def load_meta(folder: Path) -> dict[str, Any]:
    """The `meta.json` of a prepared folder, after every file it names was found whole.

    Raises:
        ValueError: the folder is missing, or a file in it is missing, cut short or changed.
    """
    folder = Path(folder)
    remedy = f"run `python pipelines/prepare.py data={folder.name}`"
    if not (folder / "meta.json").is_file():
        present = sorted(path.parent.name for path in folder.parent.glob("*/meta.json"))
        raise ValueError(f"`{folder}` holds no prepared data: {remedy}; prepared so far: {present}")
    meta = read_json(folder / "meta.json")
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        raise ValueError(f"`{folder / 'meta.json'}` lacks the hashes of its files: {remedy}")
    verify(folder, meta["files"], remedy)
    return meta


def load_split(folder: Path, split: str) -> dict[str, np.ndarray]:
    """Columns of one split as int32 arrays, (examples, length) or (examples,).

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}: choose one of {list(SPLITS)}")
    dataset = _datasets().load_from_disk(str(Path(folder) / split))
    # Its numpy format widens int32 to int64 unless told otherwise.
    columns = dataset.with_format("numpy", dtype=np.int32)[:]
    return {name: np.asarray(columns[name]) for name in dataset.column_names}


def _datasets():  # noqa: ANN202 - the module itself
    """The `datasets` module, which must not ask a hub for anything unless its user says so."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _dataset(columns: Mapping[str, np.ndarray], split: str) -> "datasets.Dataset":
    datasets = _datasets()
    integer = datasets.Value("int32")
    features = {}
    for name, column in columns.items():
        features[name] = integer
        for size in reversed(column.shape[1:]):
            features[name] = datasets.List(features[name], length=size)
    dataset = datasets.Dataset.from_dict(
        {name: np.ascontiguousarray(column, dtype=np.int32) for name, column in columns.items()},
        features=datasets.Features(features),
        split=datasets.Split(split),
    )
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(columns[name], dtype=np.int32).tobytes())
    dataset._fingerprint = digest.hexdigest()[:16]
    return dataset


def _sizes(prepared: Prepared) -> dict[str, int]:
    return {split: len(prepared.splits[split]["input_ids"]) for split in SPLITS}


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _check(prepared: Prepared) -> None:
    """Refuse what a model would choke on hours later: ragged columns and symbols outside the declared ranges."""
    meta = prepared.meta
    missing = [split for split in SPLITS if split not in prepared.splits]
    if missing:
        raise ValueError(f"`splits` lacks {missing}: give all of {list(SPLITS)}")
    for split in SPLITS:
        columns = prepared.splits[split]
        unknown = sorted(set(columns) - set(COLUMNS))
        if unknown or not {"input_ids", "labels"} <= set(columns):
            raise ValueError(f"`{split}` has columns {sorted(columns)}: give input_ids and labels, of {list(COLUMNS)}")
        inputs, labels = columns["input_ids"], columns["labels"]
        if inputs.shape != (len(inputs), meta.length) or len(inputs) == 0:
            raise ValueError(f"`{split}` input_ids have shape {inputs.shape}: give (examples > 0, {meta.length})")
        expected = {"tokens": inputs.shape, "classification": inputs.shape[:1]}.get(
            meta.task, (len(inputs), meta.target_length)
        )
        if labels.shape != expected:
            raise ValueError(f"`{split}` labels have shape {labels.shape}: task {meta.task!r} needs {expected}")
        for name, column in columns.items():
            if len(column) != len(inputs):
                raise ValueError(f"`{split}` {name} has {len(column)} rows: give {len(inputs)}, one an example")
        _check_range(f"{split} input_ids", inputs, meta.vocabulary_size)
        _check_range(f"{split} labels", labels[labels != IGNORED], meta.num_outputs)
        _check_targets(split, columns, meta)


def _check_targets(split: str, columns: Mapping[str, np.ndarray], meta: Meta) -> None:
    """`target_ids` are the labels moved on by one, behind `begin`; every label row ends; held out has references."""
    pair = meta.task == "seq2seq"
    for name, wanted in (("target_ids", pair), ("references", pair and split != "train")):
        if (name in columns) != wanted:
            word = "give" if wanted else "leave out"
            raise ValueError(f"`{split}` columns are {sorted(columns)}: {word} {name} for task {meta.task!r}")
    if not pair:
        return
    targets, labels = columns["target_ids"], columns["labels"]
    _check_range(f"{split} target_ids", targets, meta.num_outputs)
    last = (labels != IGNORED).sum(1) - 1
    before = np.where(np.arange(labels.shape[1]) < last[:, None], labels, IGNORED)[:, :-1]
    shifted = (before == IGNORED) | (before == targets[:, 1:])
    if (targets[:, 0] != meta.begin).any() or not shifted.all():
        raise ValueError(f"`{split}` target_ids must be `begin` {meta.begin} and then the labels but the last")
    if (np.take_along_axis(labels, last[:, None], 1) != meta.end).any():
        raise ValueError(f"`{split}` labels must end with `end` {meta.end} and be ignored behind it only")
    if "references" in columns:
        references = columns["references"]
        if references.ndim != 3 or references.shape[2] != meta.target_length:
            raise ValueError(
                f"`{split}` references have shape {references.shape}: give (examples, several, {meta.target_length})"
            )
        _check_range(f"{split} references", references[references != IGNORED], meta.num_outputs)


def _check_range(name: str, values: np.ndarray, bound: int) -> None:
    if values.size == 0 or values.min() < 0 or values.max() >= bound:
        span = "nothing" if values.size == 0 else f"{values.min()}..{values.max()}"
        raise ValueError(f"`{name}` holds {span}: values must lie in 0..{bound - 1}")
