"""Masked tokens: some of a window are hidden or falsified, and those are to be named from what stands on both sides.

    of k = round(fraction * L) places drawn in each window:  80 % show <mask>,  10 % a token drawn uniformly,
    10 % the token itself;  label = the token at those places, none elsewhere

Every window occurs `draws` times in training, each time with other places and other replacements. The symbol <mask> is
one more than the tokenizer has, so inputs have one symbol more than labels.

Source: "BERT: pre-training of deep bidirectional Transformers for language understanding" (Devlin, Chang, Lee,
Toutanova, 2019), https://arxiv.org/abs/1810.04805. Departure: k is the same for every window instead of a chance for
each token, so that no window is without labels and examples weigh the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnlens.data.shakespeare import Shakespeare
from attnlens.data.store import IGNORED, SPLITS, Meta, Prepared
from attnlens.data.text import cut

_HIDDEN, _FALSE = 0.8, 0.1


@dataclass(frozen=True)
class Masked:
    """The windows of a corpus with tokens hidden.

    Attributes:
        corpus: works, split, tokenizer and windows.
        fraction: of a window's tokens that have a label.
        draws: of places, for each training window.
        seed: of the places and replacements.

    Raises:
        ValueError: a fraction that hides no token, or all; no draw.
    """

    corpus: Shakespeare
    fraction: float
    draws: int
    seed: int

    def __post_init__(self) -> None:
        length = self.corpus.length
        if not 0 < round(self.fraction * length) < length:
            raise ValueError(f"`fraction` is {self.fraction}: hide 1 .. {length - 1} of a window's {length} tokens")
        if self.draws < 1:
            raise ValueError(f"`draws` is {self.draws}: choose 1 or more")

    def prepare(self, raw: Path) -> Prepared:
        """Cut the works, hide tokens, and measure the baselines.

        Raises:
            ValueError: as those of the corpus.
        """
        corpus, works = self.corpus, self.corpus.works(raw)
        encoder = corpus.tokenizer.fit(list(works.splits["train"].values()))
        limits = {"train": None, "validation": corpus.max_validation_windows, "test": corpus.max_test_windows}
        rngs = dict(zip(SPLITS, map(np.random.default_rng, np.random.SeedSequence(self.seed).spawn(3)), strict=True))
        size, windows, splits = encoder.vocabulary_size, {}, {}
        for split in SPLITS:
            texts = list(works.splits[split].values())
            windows[split] = cut(texts, encoder, corpus.length, limits[split]).columns["input_ids"]
            draws = self.draws if split == "train" else 1
            splits[split] = hide(np.tile(windows[split], (draws, 1)), self.fraction, size, rngs[split])
        meta = Meta(
            task="tokens",
            objective="masked_token",
            causal=False,
            vocabulary_size=size + 1,
            num_outputs=size,
            length=corpus.length,
            metric="accuracy",
            higher_is_better=True,
            baselines=baselines(windows["train"], splits["test"], size),
            sources={**works.sources, "draws": self.draws, "mask": size},
        )
        return Prepared(splits, meta, {"tokenizer.json": encoder.to_json()})


def hide(windows: np.ndarray, fraction: float, size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`input_ids` and `labels` of each window; tokens are 0 .. size - 1 and `size` is the mask."""
    count = round(fraction * windows.shape[1])
    places = rng.random(windows.shape).argpartition(count, axis=1)[:, :count]
    chosen = np.take_along_axis(windows, places, axis=1)
    chance = rng.random(places.shape)
    shown = np.where(chance < _HIDDEN + _FALSE, rng.integers(size, size=places.shape), chosen)
    inputs, labels = windows.copy(), np.full_like(windows, IGNORED)
    np.put_along_axis(inputs, places, np.where(chance < _HIDDEN, size, shown), axis=1)
    np.put_along_axis(labels, places, chosen, axis=1)
    return {"input_ids": inputs, "labels": labels}


def baselines(train: np.ndarray, test: Mapping[str, np.ndarray], size: int) -> dict[str, float]:
    """Test accuracy of the most frequent training token: of all, behind this left neighbor, between these two.

    A neighbor is what the input shows, mask and falsified tokens included; where a context never occurred in training,
    the next smaller one answers.
    """
    asked = test["labels"] != IGNORED
    shown = np.pad(test["input_ids"], ((0, 0), (1, 1)), constant_values=size)
    left, right = shown[:, :-2][asked], shown[:, 2:][asked]
    before, middle, after = (train[:, i : train.shape[1] - 2 + i].ravel() for i in range(3))
    base, labels = size + 1, test["labels"][asked]
    guess = np.full(len(labels), np.bincount(train.ravel()).argmax())
    found = {"majority": guess}
    for name, context, here in (
        ("left neighbor", before, left),
        ("both neighbors", before * base + after, left * base + right),
    ):
        guess = _frequent(context, middle, here, size, guess)
        found[name] = guess
    return {name: float((guess == labels).mean()) for name, guess in found.items()}


def _frequent(context: np.ndarray, token: np.ndarray, here: np.ndarray, size: int, otherwise: np.ndarray) -> np.ndarray:
    """The token that is most frequent in the context `here` (the smallest of equals), `otherwise` in an unknown one."""
    known, inverse = np.unique(context, return_inverse=True)
    both, counts = np.unique(inverse * size + token, return_counts=True)
    group, tokens = np.divmod(both, size)
    order = np.lexsort((tokens, -counts, group))
    best = tokens[order][np.unique(group[order], return_index=True)[1]]
    place = np.minimum(np.searchsorted(known, here), len(known) - 1)
    return np.where(known[place] == here, best[place], otherwise)
