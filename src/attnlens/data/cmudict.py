"""Spelling to phonemes: the CMU Pronouncing Dictionary as a task of sequence to sequence.

    input_ids = letters of a word,   target_ids = BOS p_1 ... p_m,   labels = p_1 ... p_m EOS

Each pronunciation of a training word is an example; a test word is one example, and all of its pronunciations are its
references. Related words stand on the same side: a word and what comes of it by `s`, `es`, `ies`, an apostrophe or both
(cat, cats, cat's), since one is read off the other. Other kinship remains (walk, walked), as in any split by words.

The phonemes are the 39 of the dictionary. Stress, a digit at each vowel, is dropped by default, which is what published
error rates of the task do; `stress: true` keeps it, as 15 vowels times 3 and 24 consonants.

Source: The CMU Pronouncing Dictionary, Carnegie Mellon University, http://www.speech.cs.cmu.edu/cgi-bin/cmudict. The
task without stress as in "Sequence-to-Sequence Neural Net Models for Grapheme-to-Phoneme Conversion" (Yao, Zweig,
2015), https://arxiv.org/abs/1506.00196. Departures: their split is by words alone; words with other signs than letters
and apostrophes are left out here (digits, dots, hyphens: 1193 entries), and so are those that are too long.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnlens.data import grapheme
from attnlens.data.fetch import read_source
from attnlens.data.store import IGNORED, SPLITS, Meta, Prepared

LETTERS = "'abcdefghijklmnopqrstuvwxyz"
# Inputs: 0 is padding. Outputs: 0 is the boundary, which begins and ends a sequence.
PADDING = BOUNDARY = 0

Dictionary = Mapping[str, Sequence[tuple[str, ...]]]


@dataclass(frozen=True)
class CMUDict:
    """The dictionary with its split.

    Attributes:
        source: folder of data/raw, as `fetch` left it.
        stress: whether vowels keep the digit of their stress.
        max_letters, max_phonemes: longer words and pronunciations are left out.
        num_validation, num_test: words held out; the others are training words.
        seed: of the split.

    Raises:
        ValueError: a number below 1.
    """

    source: str
    stress: bool
    max_letters: int
    max_phonemes: int
    num_validation: int
    num_test: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("max_letters", "max_phonemes", "num_validation", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: choose 1 or more")

    def prepare(self, raw: Path) -> Prepared:
        """Read, split, encode, and measure the baseline.

        Raises:
            ValueError: the source is missing or damaged, or the held-out words leave none to train on.
        """
        texts, manifest = read_source(raw / self.source)
        everything = read(texts["cmudict.dict"], stress=self.stress)
        dictionary = self._short(everything)
        words = split(dictionary, (self.num_validation, self.num_test), self.seed)
        phonemes = sorted({phoneme for sounds in dictionary.values() for sound in sounds for phoneme in sound})
        parts = {part: {word: dictionary[word] for word in words[part]} for part in words}
        rates = grapheme.baseline(parts["train"], parts["test"])
        meta = Meta(
            task="seq2seq",
            objective="seq2seq",
            causal=False,
            vocabulary_size=1 + len(LETTERS),
            num_outputs=1 + len(phonemes),
            length=self.max_letters,
            target_length=self.max_phonemes + 1,
            begin=BOUNDARY,
            end=BOUNDARY,
            metric="phoneme_error_rate",
            higher_is_better=False,
            baselines={"letter contexts": float(rates.scores.mean())},
            word_baselines={"letter contexts": float(rates.wrong.mean())},
            sources={self.source: manifest["sha256"], "words": len(everything), "words_kept": len(dictionary)},
        )
        splits = {part: self._columns(parts[part], phonemes, part) for part in SPLITS}
        symbols = {"inputs": ["<pad>", *LETTERS], "outputs": ["<boundary>", *phonemes]}
        return Prepared(splits, meta, {"symbols.json": json.dumps(symbols, indent=1)})

    def _short(self, dictionary: Dictionary) -> dict[str, list[tuple[str, ...]]]:
        kept = {
            word: [sound for sound in sounds if len(sound) <= self.max_phonemes]
            for word, sounds in dictionary.items()
            if len(word) <= self.max_letters
        }
        return {word: sounds for word, sounds in kept.items() if sounds}

    def _columns(self, dictionary: Dictionary, phonemes: Sequence[str], part: str) -> dict[str, np.ndarray]:
        """Training: an example for each pronunciation. Held out: one for each word, with all as references."""
        number = {phoneme: index + 1 for index, phoneme in enumerate(phonemes)}
        coded = {word: [[number[name] for name in sound] for sound in sounds] for word, sounds in dictionary.items()}
        most = None if part == "train" else 1
        pairs = [(word, sound) for word, sounds in coded.items() for sound in sounds[:most]]
        letters = [[LETTERS.index(letter) + 1 for letter in word] for word, _ in pairs]
        length = self.max_phonemes + 1
        columns = {
            "input_ids": padded(letters, self.max_letters, PADDING),
            "attention_mask": (padded(letters, self.max_letters, PADDING) != PADDING).astype(np.int64),
            "target_ids": padded([[BOUNDARY, *sound] for _, sound in pairs], length, BOUNDARY),
            "labels": padded([[*sound, BOUNDARY] for _, sound in pairs], length, IGNORED),
        }
        if part != "train":
            several = max(map(len, coded.values()))
            filled = [[*sounds, *([[]] * (several - len(sounds)))] for sounds in coded.values()]
            columns["references"] = np.stack([padded(sounds, length, IGNORED) for sounds in filled])
        return columns


def read(text: str, *, stress: bool) -> dict[str, list[tuple[str, ...]]]:
    """Words of letters and apostrophes, each with its different pronunciations, the dictionary's first one first."""
    dictionary: dict[str, list[tuple[str, ...]]] = {}
    for line in text.splitlines():
        # A number in brackets counts the pronunciations of a word; what follows a # is a remark.
        head, *sound = line.split("#")[0].split()
        word = re.sub(r"\(\d+\)$", "", head)
        if not re.fullmatch(rf"[{LETTERS}]+", word):
            continue
        phonemes = tuple(sound if stress else (name.rstrip("012") for name in sound))
        sounds = dictionary.setdefault(word, [])
        if phonemes not in sounds:
            sounds.append(phonemes)
    return dictionary


def family(word: str, words: Dictionary) -> str:
    """What is left of `word` without the endings s, es, ies and an apostrophe, as far as `words` has it.

    Words with the same family stand on the same side of a split.
    """
    for ending, instead in (("'s", ""), ("'", ""), ("s", ""), ("es", ""), ("ies", "y")):
        stem = word.removesuffix(ending) + instead
        if word.endswith(ending) and len(stem) > 1 and stem in words:
            return family(stem, words)
    return word


def split(dictionary: Dictionary, sizes: tuple[int, int], seed: int) -> dict[str, list[str]]:
    """Words of train, validation and test, whole families together, in the order of the dictionary.

    Raises:
        ValueError: the held-out words leave none to train on.
    """
    families: dict[str, list[str]] = {}
    for word in dictionary:
        families.setdefault(family(word, dictionary), []).append(word)
    names = list(families)
    parts: dict[str, list[str]] = {"validation": [], "test": [], "train": []}
    limits = dict(zip(parts, (*sizes, len(dictionary)), strict=True))
    for index in np.random.default_rng(seed).permutation(len(names)):
        members = families[names[index]]
        # The first part with room for the whole family.
        part = next(part for part in parts if len(parts[part]) + len(members) <= limits[part])
        parts[part] += members
    if not parts["train"] or any(len(parts[part]) < limits[part] for part in ("validation", "test")):
        raise ValueError(
            f"`num_validation`, `num_test` are {sizes}, which leaves none of {len(dictionary)} words to train on, or "
            "no family that fits: choose less"
        )
    place = {word: index for index, word in enumerate(dictionary)}
    return {part: sorted(parts[part], key=place.__getitem__) for part in SPLITS}


def padded(rows: Sequence[Sequence[int]], length: int, filler: int) -> np.ndarray:
    """The rows as one array (rows, length), `filler` behind their ends."""
    array = np.full((len(rows), length), filler, dtype=np.int64)
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array
