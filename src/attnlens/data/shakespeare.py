"""Shakespeare's plays and poems as language modeling, held out by whole works.

Splitting inside a play would put its names and phrases on both sides. The characters at the border of a split are the
works named in the config; all other works are training text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from attnlens.data.fetch import read_source
from attnlens.data.store import Prepared
from attnlens.data.text import language_modeling
from attnlens.data.tokens import AbstractTokenizer

_SUFFIX = "_gut.txt"


class Works(NamedTuple):
    """Texts by split and name, and the hash of the archive they come from."""

    splits: dict[str, dict[str, str]]
    sources: dict[str, str]


@dataclass(frozen=True)
class Shakespeare:
    """The corpus with its split.

    Attributes:
        source: folder of data/raw, as `fetch` left it.
        validation, test: names of works, without the suffix of their files.
        tokenizer: how text becomes tokens; it is fitted to the training works.
        length: tokens in a window.
        max_validation_windows, max_test_windows: at most so many, evenly spread over the works.
    """

    source: str
    validation: Sequence[str]
    test: Sequence[str]
    tokenizer: AbstractTokenizer
    length: int
    max_validation_windows: int
    max_test_windows: int

    def prepare(self, raw: Path) -> Prepared:
        """Read the fetched works below `raw`, verify them and cut them into windows.

        Raises:
            ValueError: the source is missing or damaged, or a held-out name is no work or stands in both splits.
        """
        works = self.works(raw)
        return language_modeling(
            {split: list(texts.values()) for split, texts in works.splits.items()},
            tokenizer=self.tokenizer,
            length=self.length,
            max_validation_windows=self.max_validation_windows,
            max_test_windows=self.max_test_windows,
            sources=works.sources,
        )

    def works(self, raw: Path) -> Works:
        """The fetched works below `raw`, verified.

        Raises:
            ValueError: as `prepare`.
        """
        texts, manifest = read_source(raw / self.source)
        works = {name.removesuffix(_SUFFIX): text for name, text in texts.items()}
        unknown = sorted({*self.validation, *self.test} - set(works))
        if unknown:
            raise ValueError(f"`validation` and `test` name {unknown}, which are no works: choose from {sorted(works)}")
        shared = sorted(set(self.validation) & set(self.test))
        if shared:
            raise ValueError(f"`validation` and `test` share {shared}: hold out different works")
        held_out = {*self.validation, *self.test}
        if held_out == set(works):
            raise ValueError(f"`validation` and `test` leave no work to train on: hold out fewer of {sorted(works)}")
        splits = {
            "train": {name: text for name, text in works.items() if name not in held_out},
            "validation": {name: works[name] for name in self.validation},
            "test": {name: works[name] for name in self.test},
        }
        return Works(splits, {self.source: manifest["sha256"]})
