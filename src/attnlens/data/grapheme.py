"""The baseline of spelling to phonemes: each letter says what most training letters said in the widest context seen.

    EM:       p(c | a) for chunks c of 0, 1 or 2 phonemes and letters a, so that the chunks of a word's letters are its
              pronunciation, summed over all such alignments (forward and backward sums)
    align:    the likeliest alignment of each training pronunciation
    predict:  chunk of letter i = the most frequent one among training letters with equal letters i-l .. i+r, for the
              widest (l, r) of (4, 4), (3, 4), (3, 3), (2, 3), (2, 2), (1, 2), (1, 1), (0, 1), (0, 0) that occurred

It has no model of phoneme sequences, and sees training words only. Pronunciations longer than two phonemes a letter
(most are abbreviations) cannot be aligned and are left out.

Sources: alignment as in "Conditional and joint models for grapheme-to-phoneme conversion" (Chen, 2003); decisions from
the widest known context as in "Data-oriented methods for grapheme-to-phoneme conversion" (van den Bosch, Daelemans,
1993), https://aclanthology.org/E93-1007.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from attnlens.data.edits import Rates, error_rates

Sound = tuple[str, ...]

_WINDOWS = ((4, 4), (3, 4), (3, 3), (2, 3), (2, 2), (1, 2), (1, 1), (0, 1), (0, 0))
_ITERATIONS = 8


class Batch(NamedTuple):
    """Pairs with words of one length n: letters (pairs, n) and phonemes (pairs, m), 0 behind their ends.

    Letters and phonemes are numbered from 1.
    """

    letters: np.ndarray
    phonemes: np.ndarray
    sizes: np.ndarray


class Contexts(NamedTuple):
    """A fitted baseline.

    letters: they count from 1 in this order.
    phonemes: as above.
    tables: for each window the sorted codes of the contexts, and the most frequent chunk of each.
    """

    letters: tuple[str, ...]
    phonemes: tuple[str, ...]
    tables: tuple[tuple[np.ndarray, np.ndarray], ...]


def fit(train: Mapping[str, Sequence[Sound]]) -> Contexts:
    """Align all pronunciations of the training words, and count."""
    pairs = [(word, sound) for word, sounds in train.items() for sound in sounds if len(sound) <= 2 * len(word)]
    letters = tuple(sorted({letter for word, _ in pairs for letter in word}))
    phonemes = tuple(sorted({phoneme for _, sound in pairs for phoneme in sound}))
    batches = _batches(pairs, letters, phonemes)
    num_letters, base = len(letters) + 1, len(phonemes) + 1
    table = np.full((num_letters, base * base), 1.0 / (base * base))
    for _ in range(_ITERATIONS):
        counts = np.zeros_like(table)
        for batch in batches:
            _expect(batch, table, base, counts)
        table = counts / np.maximum(counts.sum(1, keepdims=True), 1e-300)
    chunks = [align(batch, table, base) for batch in batches]
    tables = []
    for window in _WINDOWS:
        codes = np.concatenate([_contexts(batch.letters, window, num_letters).ravel() for batch in batches])
        tables.append(_majority(codes, np.concatenate([chunk.ravel() for chunk in chunks]), base * base))
    return Contexts(letters, phonemes, tuple(tables))


def predict(model: Contexts, words: Sequence[str]) -> list[Sound]:
    """A pronunciation for each word; a letter that never occurred says nothing."""
    number = {letter: index + 1 for index, letter in enumerate(model.letters)}
    base, sounds = len(model.phonemes) + 1, []
    for word in words:
        letters = np.asarray([[number.get(letter, 0) for letter in word]])
        chunks = np.full(len(word), -1)
        for window, (known, frequent) in zip(_WINDOWS, model.tables, strict=True):
            codes = _contexts(letters, window, len(model.letters) + 1)[0]
            place = np.minimum(np.searchsorted(known, codes), len(known) - 1)
            chunks = np.where((chunks < 0) & (known[place] == codes), frequent[place], chunks)
        pairs = np.stack(np.divmod(np.maximum(chunks, 0), base), 1).ravel()
        sounds.append(tuple(model.phonemes[index - 1] for index in pairs if index))
    return sounds


def baseline(train: Mapping[str, Sequence[Sound]], test: Mapping[str, Sequence[Sound]]) -> Rates:
    """Errors on `test` of the letter contexts of `train`."""
    return error_rates(predict(fit(train), list(test)), list(test.values()))


def align(batch: Batch, table: np.ndarray, base: int) -> np.ndarray:
    """Chunk of each letter in the likeliest alignment: 0 for none, p for one, base * p + p' for two phonemes."""
    best = np.zeros((len(batch.letters), batch.phonemes.shape[1] + 1))
    best[:, 0] = 1
    taken = []
    for place in range(batch.letters.shape[1]):
        options = np.stack([_shifted(best * p, size) for size, p in enumerate(_chances(batch, place, table, base))])
        taken.append(options.argmax(0))
        best = options.max(0)
    rows, end = np.arange(len(batch.letters)), batch.sizes.copy()
    chunks = np.zeros_like(batch.letters)
    for place in reversed(range(batch.letters.shape[1])):
        size = taken[place][rows, end]
        chunks[:, place] = _codes(batch, base)[size, rows, end - size]
        end = end - size
    return chunks


def _expect(batch: Batch, table: np.ndarray, base: int, counts: np.ndarray) -> None:
    """Add the expected number of times that each letter says each chunk."""
    width, length = batch.phonemes.shape[1] + 1, batch.letters.shape[1]
    forward = np.zeros((length + 1, len(batch.letters), width))
    forward[0, :, 0] = 1
    for place in range(length):
        chances = _chances(batch, place, table, base)
        forward[place + 1] = sum(_shifted(forward[place] * p, size) for size, p in enumerate(chances))
    backward = np.zeros((len(batch.letters), width))
    backward[np.arange(len(batch.letters)), batch.sizes] = 1
    total = forward[length][np.arange(len(batch.letters)), batch.sizes]
    codes = _codes(batch, base)
    for place in reversed(range(length)):
        after = np.zeros_like(backward)
        letter = np.broadcast_to(batch.letters[:, place, None], backward.shape)
        for size, p in enumerate(_chances(batch, place, table, base)):
            via = p * _shifted(backward, -size)
            np.add.at(counts, (letter, codes[size]), forward[place] * via / total[:, None])
            after += via
        backward = after


def _chances(batch: Batch, place: int, table: np.ndarray, base: int) -> np.ndarray:
    """(3, pairs, m + 1): probability that the letter at `place` says the 0, 1 or 2 phonemes from j on."""
    chances = table[batch.letters[:, place, None], _codes(batch, base)]
    # Beyond the end of the pronunciation there is nothing to say.
    left = batch.sizes[:, None] - np.arange(chances.shape[2])
    return np.where(left >= np.arange(3)[:, None, None], chances, 0.0)


def _codes(batch: Batch, base: int) -> np.ndarray:
    """(3, pairs, m + 1): codes of the chunks of 0, 1 and 2 phonemes from j on."""
    ends = np.pad(batch.phonemes, ((0, 0), (0, 2)))
    first, second = ends[:, :-1], ends[:, 1:]
    return np.stack([np.zeros_like(first), first, base * first + second])


def _shifted(array: np.ndarray, by: int) -> np.ndarray:
    """Column j of the result is column j - `by`, or 0 where there is none."""
    moved = np.zeros_like(array)
    if by > 0:
        moved[:, by:] = array[:, :-by]
    elif by < 0:
        moved[:, :by] = array[:, -by:]
    else:
        moved[:] = array
    return moved


def _batches(pairs: Sequence[tuple[str, Sound]], letters: Sequence[str], phonemes: Sequence[str]) -> list[Batch]:
    letter_number = {letter: index + 1 for index, letter in enumerate(letters)}
    number = {phoneme: index + 1 for index, phoneme in enumerate(phonemes)}
    batches = []
    for length in sorted({len(word) for word, _ in pairs}):
        group = [(word, sound) for word, sound in pairs if len(word) == length]
        sizes = np.asarray([len(sound) for _, sound in group])
        sounds = np.zeros((len(group), max(sizes)), dtype=np.int64)
        for row, (_, sound) in enumerate(group):
            sounds[row, : len(sound)] = [number[phoneme] for phoneme in sound]
        words = np.asarray([[letter_number[letter] for letter in word] for word, _ in group])
        batches.append(Batch(words, sounds, sizes))
    return batches


def _contexts(letters: np.ndarray, window: tuple[int, int], base: int) -> np.ndarray:
    """Code of the letters i - l .. i + r for each i, 0 beyond the word; at most 9 of 28 letters fit 63 bits."""
    left, right = window
    length = letters.shape[1]
    ends = np.pad(letters, ((0, 0), (left, right)))
    codes = np.zeros_like(letters)
    for offset in range(left + right + 1):
        codes = codes * base + ends[:, offset : offset + length]
    return codes


def _majority(codes: np.ndarray, chunks: np.ndarray, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """The sorted different codes, and the chunk that occurs most often with each (the smallest of equals)."""
    contexts, inverse = np.unique(codes, return_inverse=True)
    both, counts = np.unique(inverse * num_chunks + chunks, return_counts=True)
    context, chunk = np.divmod(both, num_chunks)
    order = np.lexsort((chunk, -counts, context))
    first = np.unique(context[order], return_index=True)[1]
    return contexts, chunk[order][first]
