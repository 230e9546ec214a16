"""Match3: does the sequence hold a pair that adds up to 0 modulo M with this token?

    label_i = 1[there are j, k with x_i + x_j + x_k = 0 mod M],   x_i uniform over 1 .. M - 1, M prime, M > 3

One layer of third-order attention solves it with one head of width 5, whatever n (docs/expressivity.md). A layer of
pairwise attention of H heads of width d, with p bits a number, does not if d H p is below about n: the label asks for
sums of two tokens, which it sees one at a time. j, k and i may coincide; 3 x = 0 has no solution but 0. Multiplication
by a unit maps sequences to equally likely ones and keeps labels, so P(label = 1) is the same whatever the own token is.
It is nearest to 1/2 for n^2/2 pairs over M near ln 2, that is M near 0.72 n^2.

Source: "Representational Strengths and Limitations of Transformers" (Sanford, Hsu, Telgarsky, 2023),
https://arxiv.org/abs/2306.02896. Departures: the token 0 is left out, and M is prime.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnlens.data.store import Meta, Prepared


@dataclass(frozen=True)
class Match3:
    """The task with its sizes.

    Attributes:
        length: tokens in a sequence, at least 2.
        modulus: M, a prime above 3; tokens are 1 .. M - 1.
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
            raise ValueError(f"`length` is {self.length}: choose 2 or more")
        if self.modulus < 5 or any(self.modulus % d == 0 for d in range(2, int(self.modulus**0.5) + 1)):
            raise ValueError(f"`modulus` is {self.modulus}: choose a prime above 3, near 0.72 length^2")
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
            sources={"generator": {"name": "match3", "seed": self.seed}},
        )
        return Prepared(splits, meta)


def match(tokens: np.ndarray, modulus: int) -> np.ndarray:
    """1 where the row of `tokens` (examples, length) holds two tokens, or one taken twice, or the token itself again,
    that add up to 0 modulo `modulus` with the token, else 0."""
    found = np.zeros((len(tokens), modulus), dtype=np.int32)
    for column in tokens.T:
        np.put_along_axis(found, (column[:, None] + tokens) % modulus, 1, axis=1)
    return np.take_along_axis(found, -tokens % modulus, axis=1)


def coincidence(tokens: np.ndarray, modulus: int) -> np.ndarray:
    """1 where two of i, j and k coincide in a match: another token is -2 x_i, or twice another token is -x_i."""
    found = np.zeros((2, len(tokens), modulus), dtype=np.int32)
    np.put_along_axis(found[0], tokens, 1, axis=1)
    np.put_along_axis(found[1], 2 * tokens % modulus, 1, axis=1)
    once = np.take_along_axis(found[0], -2 * tokens % modulus, axis=1)
    return once | np.take_along_axis(found[1], -tokens % modulus, axis=1)


def num_distinct(tokens: np.ndarray) -> np.ndarray:
    """Distinct tokens of every row."""
    return (np.diff(np.sort(tokens, axis=1), axis=1) > 0).sum(axis=1) + 1


def baselines(train: dict[str, np.ndarray], test: dict[str, np.ndarray], modulus: int) -> dict[str, float]:
    """Test accuracy of three rules, fitted on the training split.

    majority: the more frequent label. distinct tokens: the more frequent one among sequences with the same number of
    them. pairs: 1 where two places suffice, else the more frequent label of the other tokens; what is above needs
    triples of different places.
    """
    majority = int(train["labels"].mean() > 0.5)
    counts, share = num_distinct(train["input_ids"]), train["labels"].mean(axis=1)
    guess = np.full(train["input_ids"].shape[1] + 1, majority)
    for count in np.unique(counts):
        guess[count] = int(share[counts == count].mean() > 0.5)
    rest = int(train["labels"][coincidence(train["input_ids"], modulus) == 0].mean() > 0.5)
    pairs = coincidence(test["input_ids"], modulus) | rest
    return {
        "majority": float((test["labels"] == majority).mean()),
        "distinct tokens": float((test["labels"] == guess[num_distinct(test["input_ids"])][:, None]).mean()),
        "pairs": float((test["labels"] == pairs).mean()),
    }
