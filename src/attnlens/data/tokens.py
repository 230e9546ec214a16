"""Text to integers: bytes, characters, byte pairs or words, each saved as a `tokenizer.json`.

All know only the training text. A symbol that occurs first in held-out text becomes `<unk>` among characters, a word
outside the vocabulary `<unk>` among words (one token, learned like any other), and either becomes its bytes among
bytes and byte pairs, where nothing is unknown.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tokenizers

UNKNOWN = "<unk>"
_WORD = r" ?[\p{L}\p{N}]+(?:'[\p{L}\p{N}]+)*|[^\p{L}\p{N}]"


class AbstractEncoder(ABC):
    """A fitted tokenizer.

    Attributes:
        vocabulary_size: tokens are 0 .. vocabulary_size - 1.
        unknown: the token of every word that the vocabulary lacks, None where tokens are no words.
    """

    vocabulary_size: int
    unknown: int | None = None

    @abstractmethod
    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of `text`, and for each the number of characters of `text` up to its end."""

    @abstractmethod
    def to_json(self) -> str:
        """Content of a file that `tokenizers.Tokenizer.from_file` reads."""


class AbstractTokenizer(ABC):
    """A way to make tokens, before it has seen text."""

    @abstractmethod
    def fit(self, texts: Sequence[str]) -> AbstractEncoder:
        """The encoder that `texts` determine."""


@dataclass(frozen=True)
class Bytes(AbstractTokenizer):
    """One token a byte of UTF-8, its value; there is nothing to learn."""

    def fit(self, texts: Sequence[str]) -> "ByteEncoder":
        """The encoder, whatever the texts."""
        return ByteEncoder()


@dataclass(frozen=True)
class Characters(AbstractTokenizer):
    """One token a character; 0 is `<unk>`, the characters of the training text follow in their order in Unicode."""

    def fit(self, texts: Sequence[str]) -> "CharacterEncoder":
        """The encoder over the characters of `texts`."""
        return CharacterEncoder("".join(sorted(set().union(*texts))))


@dataclass(frozen=True)
class BytePairs(AbstractTokenizer):
    """Byte-pair encoding over the 256 bytes.

    Reference: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016,
    https://arxiv.org/abs/1508.07909; on bytes as in Radford et al., "Language Models are Unsupervised Multitask
    Learners", 2019.

    Raises:
        ValueError: a vocabulary that has no room for the bytes.
    """

    vocabulary_size: int

    def __post_init__(self) -> None:
        if self.vocabulary_size < 256:
            raise ValueError(f"`vocabulary_size` is {self.vocabulary_size}: choose 256 (the bytes) or more")

    def fit(self, texts: Sequence[str]) -> "BytePairEncoder":
        """Learn the merges on `texts`, in their order."""
        # Threads would count in an order of their own; ties between pairs must not depend on it.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return BytePairEncoder(tokenizer)


@dataclass(frozen=True)
class Words(AbstractTokenizer):
    """The most frequent words of the training text; 0 is `<unk>`.

    A word is a run of letters and digits, apostrophes inside it included, with the one space before it; every other
    character, further spaces and line breaks too, is a word of its own. Nothing is lost but what is unknown.

    Raises:
        ValueError: a vocabulary without a word.
    """

    vocabulary_size: int

    def __post_init__(self) -> None:
        if self.vocabulary_size < 2:
            raise ValueError(f"`vocabulary_size` is {self.vocabulary_size}: choose 2 (`{UNKNOWN}` and a word) or more")

    def fit(self, texts: Sequence[str]) -> "WordEncoder":
        """The encoder over the `vocabulary_size` - 1 most frequent words of `texts`, ties in the order of Unicode."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        split = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")
        counter = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
        counter.pre_tokenizer = split
        trainer = trainers.WordLevelTrainer(
            vocab_size=self.vocabulary_size, special_tokens=[UNKNOWN], show_progress=False
        )
        counter.train_from_iterator(texts, trainer)
        # Anew, since in what was trained `<unk>` is special: found as such in a text, and left out in decoding.
        tokenizer = Tokenizer(models.WordLevel(counter.get_vocab(), unk_token=UNKNOWN))
        tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
        return WordEncoder(tokenizer)


class ByteEncoder(AbstractEncoder):
    """Bytes as they are."""

    vocabulary_size = 256

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of `text`, and for each the number of characters of `text` that have begun at its end."""
        tokens = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        # Of the bytes of a character all but the first are 10xxxxxx.
        return tokens, np.cumsum(tokens >> 6 != 0b10)

    def to_json(self) -> str:
        """Content of a file that `tokenizers.Tokenizer.from_file` reads."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_visible())}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer.to_str(pretty=True)


class CharacterEncoder(AbstractEncoder):
    """Characters `symbols[i]` as token i + 1, all others as 0."""

    def __init__(self, symbols: str) -> None:
        self.symbols = symbols
        self.vocabulary_size = len(symbols) + 1
        self._points = np.frombuffer(symbols.encode("utf-32-le"), dtype=np.uint32)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of `text`, and for each the number of characters of `text` up to its end."""
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        index = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        tokens = np.where(self._points[index] == points, index + 1, 0)
        return tokens.astype(np.int64), np.arange(1, len(text) + 1)

    def to_json(self) -> str:
        """Content of a file that `tokenizers.Tokenizer.from_file` reads."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {UNKNOWN: 0} | {symbol: index + 1 for index, symbol in enumerate(self.symbols)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        return tokenizer.to_str(pretty=True)


class AbstractLibraryEncoder(AbstractEncoder):
    """A trained `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.vocabulary_size = tokenizer.get_vocab_size()

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of `text`, and for each the number of characters of `text` up to its end."""
        encoding = self.tokenizer.encode(text)
        ends = [end for _, end in encoding.offsets]
        return np.asarray(encoding.ids, dtype=np.int64), np.asarray(ends, dtype=np.int64)

    def to_json(self) -> str:
        """Content of a file that `tokenizers.Tokenizer.from_file` reads."""
        return self.tokenizer.to_str(pretty=True)


class BytePairEncoder(AbstractLibraryEncoder):
    """Merges of bytes."""


class WordEncoder(AbstractLibraryEncoder):
    """A list of words."""

    unknown = 0


def _visible() -> list[str]:
    """The character by which `tokenizers` writes each byte: itself if it is printable Latin-1, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]
