"""Multi-query associative recall: pairs of a key and a value, then some of the keys again, each asking for its value.

    k1 v1 k2 v2 ... kp vp | - k2 - - - k1 - ...        label at a query's position: the value of that key

Attention solves it in two layers at any length; a state of fixed size holds only so many pairs. Every pair is asked
for once. The distance of a query from the end of the pairs follows a power law, P(gap) ~ gap^(power - 1), drawn
without collision, as recurring words do in text. Keys, values and fillers come from disjoint sets of symbols in each
sequence, so informed guessing (one of the values present) is right with probability 1 / num_pairs exactly.

Reference: Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Re, "Zoology: Measuring and Improving Recall in
Efficient Language Models", 2023, https://arxiv.org/abs/2312.04927.

Departure: the authors fill the positions between queries with any symbols, hence with this sequence's keys and values
too, which makes stray queries without a label and, where attention looks both ways, contradicting pairs. Here fillers
are keys which the sequence does not otherwise use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnlens.data.store import IGNORED, Meta, Prepared


@dataclass(frozen=True)
class MQAR:
    """The recall task with its sizes.

    Attributes:
        length: tokens in a sequence.
        vocabulary_size: keys are the lower half of the symbols, values the upper half.
        num_pairs: of training and validation sequences, in equal parts.
        test_num_pairs: each its own slice of the test split.
        headline: the slice whose accuracy stands for the task.
        power: the exponent of the gaps' law plus one; near 0 puts most queries right behind the pairs.
        causal: whether models must not look ahead; the sequences are the same.
        seed: of the generator; splits and slices draw from independent children of it.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    length: int
    vocabulary_size: int
    num_pairs: Sequence[int]
    test_num_pairs: Sequence[int]
    headline: int
    power: float
    num_train: int
    num_validation: int
    num_test: int
    causal: bool
    seed: int

    def __post_init__(self) -> None:
        if self.headline not in self.test_num_pairs:
            raise ValueError(
                f"`headline` is {self.headline}: choose one of `test_num_pairs` {list(self.test_num_pairs)}"
            )
        for name in ("num_train", "num_validation", "num_test"):
            least = 1 if name == "num_test" else len(self.num_pairs)
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}: choose {least} or more")
        for pairs in (*self.num_pairs, *self.test_num_pairs):
            _check_sizes(self.length, self.vocabulary_size, pairs)

    def prepare(self, raw: Path) -> Prepared:
        """All three splits, drawn from disjoint streams of random numbers."""
        train, validation, test = np.random.SeedSequence(self.seed).spawn(3)
        splits = {
            "train": self._split(train, self.num_pairs, self.num_train // len(self.num_pairs), shuffle=True),
            "validation": self._split(validation, self.num_pairs, self.num_validation // len(self.num_pairs)),
            "test": self._split(test, self.test_num_pairs, self.num_test),
        }
        meta = Meta(
            task="tokens",
            objective="recall",
            causal=self.causal,
            vocabulary_size=self.vocabulary_size,
            num_outputs=self.vocabulary_size,
            length=self.length,
            metric="accuracy",
            higher_is_better=True,
            chance=1 / self.headline,
            slices={"name": "num_pairs", "values": list(self.test_num_pairs), "headline": self.headline},
            sources={"generator": {"name": "mqar", "seed": self.seed}},
        )
        return Prepared(splits, meta)

    def _split(
        self, seed: np.random.SeedSequence, num_pairs: Sequence[int], num_each: int, *, shuffle: bool = False
    ) -> dict[str, np.ndarray]:
        """`num_each` sequences of each number of pairs, with the number in the column `slice`."""
        children = seed.spawn(len(num_pairs) + 1)
        parts = [
            generate(
                np.random.default_rng(child),
                num_examples=num_each,
                length=self.length,
                vocabulary_size=self.vocabulary_size,
                num_pairs=pairs,
                power=self.power,
            )
            for child, pairs in zip(children, num_pairs, strict=False)
        ]
        columns = {
            "input_ids": np.concatenate([inputs for inputs, _ in parts]),
            "labels": np.concatenate([labels for _, labels in parts]),
            "slice": np.repeat(np.asarray(num_pairs, dtype=np.int32), num_each),
        }
        if not shuffle:
            return columns
        order = np.random.default_rng(children[-1]).permutation(len(columns["slice"]))
        return {name: column[order] for name, column in columns.items()}


def generate(
    rng: np.random.Generator,
    *,
    num_examples: int,
    length: int,
    vocabulary_size: int,
    num_pairs: int,
    power: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Recall sequences and their labels, both (num_examples, length) int32.

    Raises:
        ValueError: more pairs than the length or the vocabulary can hold.
    """
    _check_sizes(length, vocabulary_size, num_pairs)
    half = vocabulary_size // 2
    context = 2 * num_pairs
    symbols = rng.permuted(np.tile(np.arange(half, dtype=np.int32), (num_examples, 1)), axis=1)
    keys, unused = symbols[:, :num_pairs], symbols[:, num_pairs:]
    values = half + rng.permuted(np.tile(np.arange(half, dtype=np.int32), (num_examples, 1)), axis=1)[:, :num_pairs]

    inputs = np.take_along_axis(unused, rng.integers(unused.shape[1], size=(num_examples, length)), axis=1)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    positions = context + 2 * _gaps(rng, num_examples, (length - context) // 2, num_pairs, power)
    labels = np.full((num_examples, length), IGNORED, dtype=np.int32)
    np.put_along_axis(inputs, positions, keys, axis=1)
    np.put_along_axis(labels, positions, values, axis=1)
    return inputs, labels


def _gaps(rng: np.random.Generator, num_examples: int, num_slots: int, num_pairs: int, power: float) -> np.ndarray:
    """Distinct slots in 0..num_slots-1 for every pair, drawn one after another with weights (slot + 1)^(power - 1).

    The indices of the largest perturbed log-weights are such a draw without replacement (the Gumbel top-k trick:
    Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", 2019), for all examples at once.
    """
    log_weights = (power - 1) * np.log(np.arange(1, num_slots + 1))
    perturbed = log_weights + rng.gumbel(size=(num_examples, num_slots))
    return np.argsort(-perturbed, axis=1)[:, :num_pairs]


def _check_sizes(length: int, vocabulary_size: int, num_pairs: int) -> None:
    if num_pairs < 1 or 4 * num_pairs > length:
        raise ValueError(f"`num_pairs` is {num_pairs}: choose 1..{length // 4} for `length` {length}")
    if vocabulary_size % 2 or vocabulary_size < 2 * (num_pairs + 1):
        least = 2 * (num_pairs + 1)
        raise ValueError(f"`vocabulary_size` is {vocabulary_size}: choose an even number, {least} or more")
