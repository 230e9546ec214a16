"""Comedy, tragedy, history or poem: the genre of the work that a window of text comes from, which is held out whole.

Inputs are those of `attnlens.data.masked` for the same corpus, with its symbol <mask> that never occurs here, so that
an encoder which was trained on masked tokens goes on with another head. Names of persons tell nothing of a work that
was held out; what is left is manner, and few windows are labeled.

The genres of the plays are those of the First Folio's catalogue (1623), as the config lists them; Pericles, which is
not in it, stands with the comedies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnlens.data.shakespeare import Shakespeare
from attnlens.data.store import SPLITS, Meta, Prepared
from attnlens.data.text import cut
from attnlens.data.tokens import AbstractEncoder


@dataclass(frozen=True)
class Genre:
    """Labeled windows of a corpus.

    Attributes:
        corpus: works, split, tokenizer and windows; the tokenizer is fitted to all training works.
        genres: names of works by genre; classes count in the order of this mapping.
        max_train_windows: labeled, evenly spread over the training works.

    Raises:
        ValueError: a work in two genres, or a number below that of genres.
    """

    corpus: Shakespeare
    genres: Mapping[str, Sequence[str]]
    max_train_windows: int

    def __post_init__(self) -> None:
        works = [work for names in self.genres.values() for work in names]
        twice = sorted({work for work in works if works.count(work) > 1})
        if twice:
            raise ValueError(f"`genres` lists {twice} more than once: give each work one genre")
        if self.max_train_windows < len(self.genres):
            raise ValueError(f"`max_train_windows` is {self.max_train_windows}: choose {len(self.genres)} or more")

    def prepare(self, raw: Path) -> Prepared:
        """Cut the works, label their windows, and measure the baselines.

        Raises:
            ValueError: as those of the corpus; a work without a genre; a split that lacks one.
        """
        corpus, works = self.corpus, self.corpus.works(raw)
        encoder = corpus.tokenizer.fit(list(works.splits["train"].values()))
        maxima = (self.max_train_windows, corpus.max_validation_windows, corpus.max_test_windows)
        splits = {
            split: self._windows(works.splits[split], encoder, limit, split)
            for split, limit in zip(SPLITS, maxima, strict=True)
        }
        meta = Meta(
            task="classification",
            objective="classification",
            causal=False,
            vocabulary_size=encoder.vocabulary_size + 1,
            num_outputs=len(self.genres),
            length=corpus.length,
            metric="accuracy",
            higher_is_better=True,
            baselines=baselines(splits["train"], splits["test"], encoder),
            sources={**works.sources, "genres": list(self.genres)},
        )
        return Prepared(splits, meta, {"tokenizer.json": encoder.to_json()})

    def _windows(
        self, works: Mapping[str, str], encoder: AbstractEncoder, limit: int, split: str
    ) -> dict[str, np.ndarray]:
        genre = {work: index for index, names in enumerate(self.genres.values()) for work in names}
        if missing := sorted(set(works) - set(genre)):
            raise ValueError(f"`genres` lacks {missing}: give each work of {split} a genre")
        parts = [cut([text], encoder, self.corpus.length, None).columns["input_ids"] for text in works.values()]
        inputs = np.concatenate(parts)
        labels = np.repeat([genre[work] for work in works], [len(part) for part in parts])
        count = min(limit, len(labels))
        rows = np.arange(count) * len(labels) // count
        absent = [name for index, name in enumerate(self.genres) if index not in labels[rows]]
        if absent:
            raise ValueError(f"`genres` {absent} have no window in {split}: give it a work of each, or more windows")
        return {"input_ids": inputs[rows], "labels": labels[rows]}


def baselines(
    train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray], encoder: AbstractEncoder
) -> dict[str, float]:
    """Test accuracy of the most frequent training genre, and of logistic regression on n-grams of characters.

    Up to four characters, weighed by their rarity (tf-idf), the 20000 most frequent.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(encoder.to_json())
    texts = [tokenizer.decode_batch(split["input_ids"].tolist()) for split in (train, test)]
    grams = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), max_features=20000, sublinear_tf=True, lowercase=False)
    model = LogisticRegression(C=10.0, max_iter=500).fit(grams.fit_transform(texts[0]), train["labels"])
    majority = np.bincount(train["labels"]).argmax()
    return {
        "majority": float((test["labels"] == majority).mean()),
        "character n-grams": float(model.score(grams.transform(texts[1]), test["labels"])),
    }
