"""The letter contexts: alignments are likeliest ones, and a language without exceptions is learned."""

from itertools import product

import numpy as np
import pytest

from attnlens.data.grapheme import _batches, _expect, align, baseline, fit, predict

# A spelling without exceptions: c is S before e and i and K elsewhere, x says two phonemes, e at the end none.
SOUNDS = {"a": ("AA",), "b": ("B",), "i": ("IY",), "x": ("K", "S"), "t": ("T",)}


def pronounce(word: str) -> tuple[str, ...]:
    sound: list[str] = []
    for place, letter in enumerate(word):
        after = word[place + 1 : place + 2]
        if letter == "c":
            sound.append("S" if after in ("e", "i") and after else "K")
        elif letter == "e":
            sound += ["EH"] if after else []
        else:
            sound += SOUNDS[letter]
    return tuple(sound)


def language(seed: int, size: int) -> dict[str, list[tuple[str, ...]]]:
    rng = np.random.default_rng(seed)
    words = {"".join(rng.choice(list("abceitx"), size=rng.integers(2, 6))) for _ in range(size)}
    return {word: [pronounce(word)] for word in sorted(words) if pronounce(word)}


def test_a_language_without_exceptions_is_learned():
    train, test = language(0, 1500), language(1, 200)
    unseen = {word: sounds for word, sounds in test.items() if word not in train}
    assert len(unseen) > 50
    rates = baseline(train, unseen)
    assert rates.scores.mean() < 0.01
    assert predict(fit(train), ["cxice"]) == [("K", "K", "S", "IY", "S")]


def paths(length: int, size: int) -> list[tuple[int, ...]]:
    return [chunks for chunks in product((0, 1, 2), repeat=length) if sum(chunks) == size]


def chunks_of(path: tuple[int, ...], sound: np.ndarray, base: int) -> list[int]:
    codes, at = [], 0
    for size in path:
        part = sound[at : at + size]
        codes.append(int(sum(p * base ** (size - 1 - i) for i, p in enumerate(part))))
        at += size
    return codes


@pytest.fixture
def toy():
    pairs = [("abc", ("X", "Y")), ("cab", ("Y", "X", "X", "Y")), ("bba", ("Y",))]
    [batch] = _batches(pairs, "abc", "XY")
    table = np.random.default_rng(0).dirichlet(np.ones(9), size=4)
    return batch, table


def every_path(batch, table, row: int, base: int = 3) -> list[tuple[float, list[int]]]:
    size = int(batch.sizes[row])
    found = []
    for path in paths(batch.letters.shape[1], size):
        chunks = chunks_of(path, batch.phonemes[row, :size], base)
        found.append((float(np.prod([table[a, c] for a, c in zip(batch.letters[row], chunks, strict=True)])), chunks))
    return found


def test_the_alignment_is_the_likeliest_of_all(toy):
    batch, table = toy
    for row, chunks in enumerate(align(batch, table, 3)):
        assert chunks.tolist() == max(every_path(batch, table, row))[1]


def test_expected_counts_are_sums_over_all_alignments(toy):
    batch, table = toy
    counts, expected = np.zeros_like(table), np.zeros_like(table)
    _expect(batch, table, 3, counts)
    for row in range(3):
        all_paths = every_path(batch, table, row)
        total = sum(chance for chance, _ in all_paths)
        for chance, chunks in all_paths:
            np.add.at(expected, (batch.letters[row], chunks), chance / total)
    np.testing.assert_allclose(counts, expected, atol=1e-12)


def test_test_words_do_not_reach_the_baseline():
    train = language(0, 300)
    assert predict(fit(train), ["zzz", "abz"]) == [(), ("AA", "B")]
    assert baseline(train, {"ab": [("AA", "B")]}).scores[0] == 0
