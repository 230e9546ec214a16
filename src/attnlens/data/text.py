"""Works of text to next-token windows, beside the n-gram models that any attention must beat.

    input_ids = tokens[t : t + L],   labels = tokens[t + 1 : t + L + 1],   t = 0, L, 2L, ... inside each work

Windows do not overlap and do not cross works; the rest of a work that fills no window is dropped. The baselines are
measured on the characters which the chosen test labels cover, each seeing all of its work before it, where a model
sees its window only: the comparison favors the baselines.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from attnlens.data import ngram
from attnlens.data.spelling import Speller
from attnlens.data.store import Meta, Prepared
from attnlens.data.tokens import AbstractEncoder, AbstractTokenizer, Characters


class Windows(NamedTuple):
    """Windows over several works, and where their labels lie.

    Attributes:
        columns: `input_ids` and `labels`, (windows, length).
        targets: for each work, which of its characters the labels cover.
    """

    columns: dict[str, np.ndarray]
    targets: list[np.ndarray]


def language_modeling(
    works: Mapping[str, Sequence[str]],
    *,
    tokenizer: AbstractTokenizer,
    length: int,
    max_validation_windows: int,
    max_test_windows: int,
    sources: Mapping[str, object],
) -> Prepared:
    """A causal language modeling data set from the texts of the three splits.

    Raises:
        ValueError: a split whose works are all shorter than a window.
    """
    encoder = tokenizer.fit(works["train"])
    limits = {"train": None, "validation": max_validation_windows, "test": max_test_windows}
    windows = {split: cut(works[split], encoder, length, limit) for split, limit in limits.items()}
    test = windows["test"]
    characters = Characters().fit(works["train"])
    symbols = {split: [characters.encode(text)[0] for text in works[split]] for split in ("train", "test")}
    covered = {split: sum(int(target.sum()) for target in windows[split].targets) for split in ("validation", "test")}
    unknown = sum(int((ids[target] == 0).sum()) for ids, target in zip(symbols["test"], test.targets, strict=True))
    per_token = covered["test"] / test.columns["labels"].size
    meta = Meta(
        task="tokens",
        objective="next_token",
        causal=True,
        vocabulary_size=encoder.vocabulary_size,
        num_outputs=encoder.vocabulary_size,
        length=length,
        metric="bits_per_character",
        higher_is_better=False,
        baselines=ngram.bits_per_symbol(
            symbols["train"], symbols["test"], test.targets, vocabulary_size=characters.vocabulary_size
        ),
        characters_per_token=per_token,
        spelling=spelling(encoder, works, {split: windows[split].targets for split in covered}),
        sources={**sources, "test_characters": covered["test"], "unknown_test_characters": unknown},
    )
    splits = {split: window.columns for split, window in windows.items()}
    return Prepared(splits, meta, {"tokenizer.json": encoder.to_json()})


def spelling(
    encoder: AbstractEncoder, works: Mapping[str, Sequence[str]], targets: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, float] | None:
    """Bits per character that the unknown words of each split of `targets` add, None where tokens are no words."""
    if encoder.unknown is None:
        return None
    speller = Speller(encoder, works["train"])
    characters = {split: sum(int(target.sum()) for target in targets[split]) for split in targets}
    return {split: speller.bits(works[split], targets[split]) / characters[split] for split in targets}


def cut(texts: Sequence[str], encoder: AbstractEncoder, length: int, limit: int | None) -> Windows:
    """Windows of `length` tokens over `texts`, at most `limit`, evenly spread over all of them.

    Raises:
        ValueError: a limit below 1, or no text that fills a window.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} windows leaves none: choose 1 or more, or null for all")
    encoded = [encoder.encode(text) for text in texts]
    # The last label of a window is the token after it.
    places = [(work, start) for work, (ids, _) in enumerate(encoded) for start in range(0, len(ids) - length, length)]
    if not places:
        raise ValueError(f"`length` is {length}, and no text of the split has {length + 1} tokens: choose less")
    if limit is not None and limit < len(places):
        places = [places[index * len(places) // limit] for index in range(limit)]
    targets = [np.zeros(len(text), dtype=bool) for text in texts]
    inputs = np.empty((len(places), length), dtype=np.int64)
    labels = np.empty_like(inputs)
    for row, (work, start) in enumerate(places):
        ids, ends = encoded[work]
        inputs[row] = ids[start : start + length]
        labels[row] = ids[start + 1 : start + length + 1]
        targets[work][ends[start] : ends[start + length]] = True
    return Windows({"input_ids": inputs, "labels": labels}, targets)
