"""Unknown words cost their spelling: a distribution over words, and the accounting adds up."""

from itertools import product

import numpy as np
import pytest

from attnlens.data.spelling import Speller, unknown_words
from attnlens.data.text import language_modeling
from attnlens.data.tokens import Characters, Words

TRAIN = ["the king and the queen and the king saw a fool\n" * 3 + "once ab ba abba baa\n"]


def speller(size: int = 5) -> Speller:
    return Speller(Words(size).fit(TRAIN), TRAIN)


def test_costs_are_those_of_a_distribution_over_words():
    """Summed over all words up to some length, the probabilities stay below 1, and over all words they reach it."""
    model = Speller(Words(2).fit(["a a a ab"]), ["a a a ab"])
    symbols = model.characters.symbols
    mass = [
        sum(2 ** -model.cost("".join(word)) for word in product(symbols + "?", repeat=length)) for length in range(7)
    ]
    assert 0.9 < sum(mass) <= 1 + 1e-9


def test_a_word_like_the_rare_ones_costs_less_than_its_letters_shuffled():
    assert speller().cost(" abba") < speller().cost("b abab"[:5])


def test_unknown_words_stand_where_they_were():
    encoder, text = Words(5).fit(TRAIN), "the queen's ☺ king"
    assert [word for word, _ in unknown_words(encoder, text)] == ["the", " queen's", " ", "☺"]
    assert all(text[:end].endswith(word) for word, end in unknown_words(encoder, text))
    assert unknown_words(Characters().fit(TRAIN), "☺") == []


def test_bits_are_the_costs_of_the_words_that_are_targets():
    model, text = speller(), "the jester and the fool"
    target = np.zeros(len(text), dtype=bool)
    assert model.bits([text], [target]) == 0
    target[3:] = True
    words = [word for word, end in unknown_words(model.encoder, text) if end > 3]
    assert " jester" in words
    assert model.bits([text], [target]) == pytest.approx(sum(map(model.cost, words)))


def test_a_vocabulary_that_holds_every_training_word_spells_after_them():
    assert speller(1000).cost(" abba") < speller(1000).cost(" xyzz")


def test_the_smaller_vocabulary_pays_more_for_spelling():
    """What `<unk>` saves in tokens is charged here: with the spelling no vocabulary gains by losing words."""
    works = {"train": TRAIN * 5, "validation": TRAIN, "test": [TRAIN[0] + "a jester saw the abba\n" * 9]}

    def spelled(tokenizer) -> float:
        options = {"max_validation_windows": 1, "max_test_windows": 50, "sources": {}, "length": 4}
        meta = language_modeling(works, tokenizer=tokenizer, **options).meta
        return meta.spelling["test"] if meta.spelling else 0.0

    costs = [spelled(Words(size)) for size in (2, 6, 12)]
    assert costs[0] > costs[1] > costs[2] > 0
    assert spelled(Characters()) == 0
