"""Match2: does the sequence hold a partner of this token, the one that adds up to 0 modulo M with it?

    label_i = 1[there is a j with x_i + x_j = 0 mod M],   x_i uniform over 1 .. M - 1, M odd

One layer of attention solves it with width O(log n), if queries look for the negative of their token; a network that
sends the sequence through fewer than about n bits cannot. Without 0 and with M odd no token is its own partner, so a
label never depends on its own token alone: given x_i, every other token is the partner with probability 1 / (M - 1),

    P(label = 1) = 1 - (1 - 1 / (M - 1))^(n - 1),

for every value of x_i, and is nearest to 1/2 for M - 1 near n / ln 2.

Source: "Representational Strengths and Limitations of Transformers" (Sanford, Hsu, Telgarsky, 2023),
https://arxiv.org/abs/2306.02896. Departure: the token 0 is left out, which answers itself.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnlens.data.store import Meta, Prepared


@dataclass(frozen=True)
class Match2:
    """The matching task with its sizes.

    Attributes:
        length: tokens in a sequence, at least 2.
        modulus: M, an odd number, 3 or more; tokens are 1 .. M - 1.
        num_train, num_validation, num_test: sequences of each split, at least 1.
        seed: of the generator; splits draw from independent children of it.

    Raises:
        ValueError: sizes that are out of range.
    """

    length: int
    modulus: int
    num_train: int
    num_validation: int
    num_test: int
    seed: int

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"`length` is {self.length}: choose 2 or more, a token and its partner")
        if self.modulus < 3 or self.modulus % 2 == 0:
            raise ValueError(
                f"`modulus` is {self.modulus}: choose an odd number, 3 or more; half of an even one is its own partner"
            )
        for name in ("num_train", "num_validation", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: choose 1 or more")

    def prepare(self, raw: Path) -> Prepared:
        """All three splits, drawn from disjoint streams of random numbers."""
        sizes = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        children = np.random.SeedSequence(self.seed).spawn(len(sizes))
        splits = {}
        for (split, size), child in zip(sizes.items(), children, strict=True):
            inputs = np.random.default_rng(child).integers(1, self.modulus, size=(size, self.length), dtype=np.int32)
            splits[split] = {"input_ids": inputs, "labels": match(inputs, self.modulus)}
        meta = Meta(
            task="tokens",
            objective="classification",
            causal=False,
            vocabulary_size=self.modulus,
            num_outputs=2,
            length=self.length,
            metric="accuracy",
            higher_is_better=True,
            baselines=baselines(splits["train"], splits["test"], self.modulus),
            sources={"generator": {"name": "match2", "seed": self.seed}},
        )
        return Prepared(splits, meta)


def match(tokens: np.ndarray, modulus: int) -> np.ndarray:
    """1 where the row of `tokens` (examples, length) holds the negative of the token modulo `modulus`, else 0."""
    present = np.zeros((len(tokens), modulus), dtype=np.int32)
    np.put_along_axis(present, tokens, 1, axis=1)
    return np.take_along_axis(present, -tokens % modulus, axis=1)


def baselines(train: dict[str, np.ndarray], test: dict[str, np.ndarray], modulus: int) -> dict[str, float]:
    """Test accuracy of the more frequent training label, and of the best guess from the number of distinct tokens.

    Of d distinct tokens in a sequence, d - 1 are as likely as not the partner of a given one: it is there with
    probability (d - 1) / (modulus - 2).
    """
    majority = int(train["labels"].mean() > 0.5)
    distinct = (np.diff(np.sort(test["input_ids"], axis=1), axis=1) > 0).sum(axis=1) + 1
    guess = 2 * (distinct - 1) > modulus - 2
    return {
        "majority": float((test["labels"] == majority).mean()),
        "distinct tokens": float((test["labels"] == guess[:, None]).mean()),
    }
