"""Series: several series at once, a matrix of time x channel; which channel goes with this one, and which leads?

Channels form random pairs of a leader and a follower, which repeats the leader one step later, with noise:

    x_leader(t) = e,   x_follower(t) = rho x_leader(t - 1) + sqrt(1 - rho^2) e',   e, e' Gaussian, independent.

A sequence is the matrix row by row, token t C + c the cell (t, c): its value, cut into levels of equal probability.
The label of each cell is the partner of its channel, plus C if the channel follows. Every channel by itself is white
noise, all cells of one time are independent, and every pairing is as likely as any other: neither a channel alone nor
the channels of one time tell anything, and a guess is right with probability 1 / (2 (C - 1)). What tells is a
comparison across channels and steps, and one step is a guess that the others must confirm. The leader's role shows in
the sign of the lag only.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnlens.data.store import Meta, Prepared


@dataclass(frozen=True)
class Series:
    """The pairing task with its sizes.

    Attributes:
        num_steps: rows of the matrix, at least 2.
        num_channels: columns, C, an even number, at least 4.
        num_levels: values that a token tells apart, at least 2.
        coupling: rho, the correlation of a follower with its leader one step before, above 0 and up to 1.
        num_train, num_validation, num_test: matrices of each split, at least 1.
        seed: of the generator; splits draw from independent children of it.

    Raises:
        ValueError: sizes that are out of range.
    """

    num_steps: int
    num_channels: int
    num_levels: int
    coupling: float
    num_train: int
    num_validation: int
    num_test: int
    seed: int

    def __post_init__(self) -> None:
        least = {"num_steps": 2, "num_channels": 4, "num_levels": 2, "num_train": 1, "num_validation": 1, "num_test": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"`{name}` is {getattr(self, name)}: choose {bound} or more")
        if self.num_channels % 2:
            raise ValueError(f"`num_channels` is {self.num_channels}: choose an even number, channels form pairs")
        if not 0 < self.coupling <= 1:
            raise ValueError(f"`coupling` is {self.coupling}: choose a correlation above 0 and up to 1")

    def prepare(self, raw: Path) -> Prepared:
        """All three splits, drawn from disjoint streams of random numbers."""
        sizes = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        children = np.random.SeedSequence(self.seed).spawn(len(sizes))
        splits = {}
        for (split, size), child in zip(sizes.items(), children, strict=True):
            rng = np.random.default_rng(child)
            partner, follows = pairs(rng, size, self.num_channels)
            tokens = quantize(process(rng, partner, follows, self.num_steps, self.coupling), self.num_levels)
            labels = np.repeat((partner + self.num_channels * follows)[:, None], self.num_steps, axis=1)
            splits[split] = {
                "input_ids": tokens.reshape(size, -1),
                "labels": labels.reshape(size, -1).astype(np.int32),
            }
        meta = Meta(
            task="tokens",
            objective="classification",
            causal=False,
            vocabulary_size=self.num_levels,
            num_outputs=2 * self.num_channels,
            length=self.num_steps * self.num_channels,
            metric="accuracy",
            higher_is_better=True,
            chance=1 / (2 * (self.num_channels - 1)),
            baselines=baselines(splits["test"], self.num_channels),
            sources={"generator": {"name": "series", "seed": self.seed}},
        )
        return Prepared(splits, meta)


def pairs(rng: np.random.Generator, num_examples: int, num_channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(num_examples, num_channels) each: the partner of a channel, and whether it follows it (0 or 1)."""
    order = rng.permuted(np.tile(np.arange(num_channels), (num_examples, 1)), axis=1)
    partner, follows = np.empty_like(order), np.zeros_like(order)
    # The first half leads the second.
    np.put_along_axis(partner, order, np.roll(order, num_channels // 2, axis=1), axis=1)
    np.put_along_axis(follows, order[:, num_channels // 2 :], 1, axis=1)
    return partner, follows


def process(
    rng: np.random.Generator, partner: np.ndarray, follows: np.ndarray, num_steps: int, coupling: float
) -> np.ndarray:
    """(examples, steps, channels) of the process; every cell is standard Gaussian."""
    noise = rng.standard_normal((len(partner), num_steps + 1, partner.shape[1]))
    led = np.take_along_axis(noise[:, :-1], partner[:, None], axis=2)
    followed = coupling * led + np.sqrt(1 - coupling**2) * noise[:, 1:]
    return np.where(follows[:, None] == 1, followed, noise[:, 1:])


def quantize(x: np.ndarray, num_levels: int) -> np.ndarray:
    """The level of each value, int32, cut at the quantiles of the standard Gaussian."""
    from scipy.stats import norm

    edges = norm.ppf(np.arange(1, num_levels) / num_levels)
    return np.searchsorted(edges, x).astype(np.int32)


def nearest(tokens: np.ndarray, num_channels: int, lags: tuple[int, ...]) -> np.ndarray:
    """(examples, channels): for each channel the label whose channel, shifted by one of the lags, is nearest to it.

    Lag 1 compares with what the other showed one step before, which makes this one the follower. Nearness is the mean
    squared difference of levels.
    """
    x = tokens.reshape(len(tokens), -1, num_channels).astype(np.float64)
    distances = []
    for lag in lags:
        later, earlier = x[:, abs(lag) :], x[:, : x.shape[1] - abs(lag)]
        own, other = (later, earlier) if lag >= 0 else (earlier, later)
        distance = np.square(own[:, :, :, None] - other[:, :, None]).mean(axis=1)
        distance[:, np.arange(num_channels), np.arange(num_channels)] = np.inf
        distances.append(distance)
    best = np.concatenate(distances, axis=2).argmin(axis=2)
    follows = np.array(lags)[best // num_channels] > 0
    return best % num_channels + num_channels * follows


def baselines(test: dict[str, np.ndarray], num_channels: int) -> dict[str, float]:
    """Test accuracy of two rules: the channel nearest at the same time, and that nearest one step apart.

    The second is what the task asks for: a ceiling rather than something to beat.
    """
    asked = test["labels"].reshape(len(test["labels"]), -1, num_channels)[:, 0]
    rules = {"nearest at the same time": (0,), "nearest one step apart": (1, -1)}
    return {
        name: float((nearest(test["input_ids"], num_channels, lags) == asked).mean()) for name, lags in rules.items()
    }
