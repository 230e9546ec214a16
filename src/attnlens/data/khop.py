"""k-hop induction heads: what followed this token last time, asked of the answer's place again, k times.

    find(i) = the largest j <= i with x_{j-1} = x_i,   label_i = x_{find^k(i)}

One hop is the induction head. k hops take a network that moves one step a layer k layers; attention composes hops,
and about log2 k layers suffice. Sequences are uniform over those in which no token equals the one before it: a label
is any of the other tokens with the same probability whatever x_i is, so that without the past a guess is right with
probability 1 / (num_symbols - 1) for one hop. A position from which the chain of hops leaves the sequence has no
label.

Source: "Transformers, Parallel Computation, and Logarithmic Depth" (Sanford, Hsu, Telgarsky, 2024),
https://arxiv.org/abs/2402.09268. Departures: the number of hops is fixed for a data set rather than named by the first
token, and positions without an answer are not asked, where the paper has a symbol for "none".
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnlens.data.store import IGNORED, Meta, Prepared


@dataclass(frozen=True)
class KHop:
    """The induction task with its sizes.

    Attributes:
        length: tokens in a sequence, at least 3.
        num_symbols: the alphabet, at least 3.
        num_hops: k, at least 1.
        num_train, num_validation, num_test: sequences of each split, at least 1.
        seed: of the generator; splits draw from independent children of it.

    Raises:
        ValueError: sizes that are out of range.
    """

    length: int
    num_symbols: int
    num_hops: int
    num_train: int
    num_validation: int
    num_test: int
    seed: int

    def __post_init__(self) -> None:
        least = {"length": 3, "num_symbols": 3, "num_hops": 1, "num_train": 1, "num_validation": 1, "num_test": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"`{name}` is {getattr(self, name)}: choose {bound} or more")

    def prepare(self, raw: Path) -> Prepared:
        """All three splits, drawn from disjoint streams of random numbers."""
        sizes = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        children = np.random.SeedSequence(self.seed).spawn(len(sizes))
        splits = {}
        for (split, size), child in zip(sizes.items(), children, strict=True):
            inputs = sequences(np.random.default_rng(child), size, self.length, self.num_symbols)
            splits[split] = {"input_ids": inputs, "labels": hop(inputs, self.num_symbols, self.num_hops)}
        meta = Meta(
            task="tokens",
            objective="recall",
            causal=True,
            vocabulary_size=self.num_symbols,
            num_outputs=self.num_symbols,
            length=self.length,
            metric="accuracy",
            higher_is_better=True,
            chance=1 / (self.num_symbols - 1),
            baselines={"last 5 tokens": within(splits["test"]["input_ids"], self.num_symbols, self.num_hops, reach=5)},
            sources={"generator": {"name": "khop", "seed": self.seed}},
        )
        return Prepared(splits, meta)


def sequences(rng: np.random.Generator, num_examples: int, length: int, num_symbols: int) -> np.ndarray:
    """(num_examples, length) int32, uniform over the sequences without equal neighbors."""
    steps = rng.integers(1, num_symbols, size=(num_examples, length))
    steps[:, 0] = rng.integers(num_symbols, size=num_examples)
    return (steps.cumsum(axis=1) % num_symbols).astype(np.int32)


def find(tokens: np.ndarray, num_symbols: int) -> np.ndarray:
    """The place behind the last earlier occurrence of each token of (examples, length), -1 where there is none."""
    behind = np.full((len(tokens), num_symbols), -1)
    found = np.empty(tokens.shape, dtype=np.int64)
    for place in range(tokens.shape[1]):
        token = tokens[:, place : place + 1]
        found[:, place] = np.take_along_axis(behind, token, axis=1)[:, 0]
        np.put_along_axis(behind, token, place + 1, axis=1)
    return found


def places(tokens: np.ndarray, num_symbols: int, num_hops: int) -> np.ndarray:
    """find^k of every place of (examples, length), -1 from the first hop on that finds nothing."""
    found = find(tokens, num_symbols)
    place = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    for _ in range(num_hops):
        place = np.where(place < 0, -1, np.take_along_axis(found, np.maximum(place, 0), axis=1))
    return place


def hop(tokens: np.ndarray, num_symbols: int, num_hops: int) -> np.ndarray:
    """The token at find^k of every place, int32, `IGNORED` where there is none."""
    place = places(tokens, num_symbols, num_hops)
    labels = np.take_along_axis(tokens, np.maximum(place, 0), axis=1)
    return np.where(place < 0, IGNORED, labels).astype(np.int32)


def within(tokens: np.ndarray, num_symbols: int, num_hops: int, reach: int) -> float:
    """Accuracy of the rule: hop inside the last `reach` tokens, the own included; name the first of them otherwise.

    For one hop no rule that sees these tokens does better. Beyond them the answer is any symbol but the own with equal
    probability, and it is the first of them where the occurrence is the token just before.
    """
    place, here = places(tokens, num_symbols, num_hops), np.arange(tokens.shape[1])
    first = tokens[:, np.maximum(here - reach + 1, 0)]
    right = (place - 1 > here - reach) | (np.take_along_axis(tokens, np.maximum(place, 0), axis=1) == first)
    asked = place >= 0
    return float(((right & asked).sum(axis=1) / np.maximum(asked.sum(axis=1), 1)).mean())
