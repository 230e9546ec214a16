"""A task of pairs that a small model learns in seconds: say the letters of the source, then the last one again."""

from pathlib import Path

import numpy as np

from attnlens.data.store import IGNORED, Meta, Prepared, save

LENGTH, SYMBOLS = 5, 6


def columns(rng: np.random.Generator, size: int, *, references: bool) -> dict[str, np.ndarray]:
    """Sources of 1 to 5 letters 1..5; the target has one token more, and the boundary is 0."""
    inputs = np.zeros((size, LENGTH), dtype=int)
    targets, labels = np.zeros((size, LENGTH + 2), dtype=int), np.full((size, LENGTH + 2), IGNORED)
    for row in range(size):
        letters = rng.integers(1, SYMBOLS, size=rng.integers(1, LENGTH + 1))
        said = [*letters, letters[-1]]
        inputs[row, : len(letters)] = letters
        targets[row, 1 : len(said) + 1] = said
        labels[row, : len(said) + 1] = [*said, 0]
    found = {"input_ids": inputs, "attention_mask": (inputs > 0).astype(int), "target_ids": targets, "labels": labels}
    if references:
        found["references"] = np.where(labels == 0, IGNORED, labels)[:, None]
    return found


def prepare_pairs(root: Path, num_train: int = 400, name: str = "cmudict") -> dict:
    """The task under the name of the experiment that it stands for."""
    rng = np.random.default_rng(0)
    sizes = {"train": num_train, "validation": 20, "test": 40}
    splits = {split: columns(rng, size, references=split != "train") for split, size in sizes.items()}
    meta = Meta(
        task="seq2seq",
        objective="seq2seq",
        causal=False,
        vocabulary_size=SYMBOLS,
        num_outputs=SYMBOLS,
        length=LENGTH,
        target_length=LENGTH + 2,
        begin=0,
        end=0,
        metric="phoneme_error_rate",
        higher_is_better=False,
    )
    return save(Prepared(splits, meta), root / "data" / "prepared" / name)
