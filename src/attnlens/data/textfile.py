"""A text file of one's own as language modeling: its head is training text, its last parts are held out."""

from dataclasses import dataclass
from pathlib import Path

from attnlens.data.integrity import sha256
from attnlens.data.store import Prepared
from attnlens.data.text import language_modeling
from attnlens.data.tokens import AbstractTokenizer


@dataclass(frozen=True)
class TextFile:
    """One UTF-8 file with its split, in the order of the text: training, validation, test.

    Attributes:
        path: of the file, from the folder the command runs in.
        validation_fraction, test_fraction: of the file's characters.
        tokenizer: how text becomes tokens; it is fitted to the training part.
        length: tokens in a window.
        max_validation_windows, max_test_windows: at most so many, evenly spread.

    Raises:
        ValueError: no path, or fractions that leave a part empty.
    """

    path: str | None
    validation_fraction: float
    test_fraction: float
    tokenizer: AbstractTokenizer
    length: int
    max_validation_windows: int
    max_test_windows: int

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError("`path` is null: name the text file, data.path=my.txt")
        held_out = self.validation_fraction + self.test_fraction
        if min(self.validation_fraction, self.test_fraction) <= 0 or held_out >= 1:
            raise ValueError(
                f"`validation_fraction`, `test_fraction` are {self.validation_fraction}, {self.test_fraction}: choose "
                "positive numbers with a sum below 1"
            )

    def prepare(self, raw: Path) -> Prepared:
        """Read the file and cut it.

        Raises:
            ValueError: there is no such file, it is not UTF-8, or a part is shorter than a window.
        """
        path = Path(str(self.path))
        if not path.is_file():
            raise ValueError(f"`path` {path} is no file: name a text file, data.path=my.txt")
        text = path.read_text(encoding="utf-8")
        test = len(text) - int(len(text) * self.test_fraction)
        validation = test - int(len(text) * self.validation_fraction)
        return language_modeling(
            {"train": [text[:validation]], "validation": [text[validation:test]], "test": [text[test:]]},
            tokenizer=self.tokenizer,
            length=self.length,
            max_validation_windows=self.max_validation_windows,
            max_test_windows=self.max_test_windows,
            sources={path.name: sha256(path)},
        )
