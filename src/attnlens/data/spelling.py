"""What a word costs that the vocabulary lacks: `<unk>` says that there is one, and its spelling has to be paid for.

    cost(w) = - sum_i log2 p(w_i | w_{i-4} ... w_{i-1}),   i = 1 .. |w| + 1,   the last symbol being the end of the word

Without it a vocabulary of two words would have the fewest bits per character, since it loses what it does not predict.
p is an interpolated Kneser-Ney 5-gram over characters, counted once on each different training word that the
vocabulary lacks, for those are the words most like the unknown ones. It does not know what stands before the word, so
the cost is an upper bound, and it is the same for every model: differences between models are those of their tokens.

The idea of spelling unknown words is that of Mielke and Eisner, "Spell Once, Summon Anywhere: A Two-Level
Open-Vocabulary Language Model", 2019, https://arxiv.org/abs/1804.08205; theirs is learned together with the rest.
"""

from collections.abc import Sequence

import numpy as np

from attnlens.data import ngram
from attnlens.data.tokens import AbstractEncoder, Characters

_ORDER = 5


class Speller:
    """The cost of spelling unknown words, learned from the training works."""

    def __init__(self, encoder: AbstractEncoder, train: Sequence[str]) -> None:
        rare = sorted({word for text in train for word, _ in unknown_words(encoder, text)})
        # A vocabulary that holds every training word: then they are all there is to learn from.
        rare = rare or sorted({word for text in train for word, _ in _words(encoder, text)})
        self.encoder, self.characters = encoder, Characters().fit(rare)
        # One symbol more than characters: the end of a word.
        self._end = self.characters.vocabulary_size
        self._model = ngram.fit([self._symbols(word) for word in rare], self._end + 1, _ORDER)

    def bits(self, texts: Sequence[str], targets: Sequence[np.ndarray]) -> float:
        """Bits for all unknown words of `texts` whose characters are marked in `targets`."""
        total = 0.0
        for text, target in zip(texts, targets, strict=True):
            words = [word for word, end in unknown_words(self.encoder, text) if target[end - 1]]
            total += sum(map(self.cost, words))
        return total

    def cost(self, word: str) -> float:
        """Bits for one word."""
        return float(-np.log2(ngram.probabilities(self._model, self._symbols(word), _ORDER)).sum())

    def _symbols(self, word: str) -> np.ndarray:
        return np.append(self.characters.encode(word)[0], self._end)


def unknown_words(encoder: AbstractEncoder, text: str) -> list[tuple[str, int]]:
    """The parts of `text` that became `<unk>`, and where each ends."""
    if encoder.unknown is None:
        return []
    known = encoder.encode(text)[0] != encoder.unknown
    return [word for word, is_known in zip(_words(encoder, text), known, strict=True) if not is_known]


def _words(encoder: AbstractEncoder, text: str) -> list[tuple[str, int]]:
    _, ends = encoder.encode(text)
    return [(text[start:end], end) for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
