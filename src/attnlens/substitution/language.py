"""A pretrained language model on plays, one to fit on and one to test on, by perplexity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlens.models.pretrained.smollm2 import load_smollm2
from attnlens.substitution.subject import AbstractSource, AbstractSubject, Batch
from attnlens.substitution.texts import read_work


@dataclass(frozen=True)
class SmolLm2(AbstractSource):
    """SmolLM2-135M on windows of two works.

    Attributes:
        source: folder of data/raw that holds the model.
        text: folder of data/raw that holds the works.
        fit, test: names of works.
        num_fit, num_test: windows of each, from its beginning.
        length: tokens in a window.
    """

    source: str
    text: str
    fit: str
    test: str
    num_fit: int
    num_test: int
    length: int

    def load(self, root: Path) -> "LanguageSubject":
        loaded = load_smollm2(root / "data/raw" / self.source)
        fit, test = (
            _windows(loaded.tokenizer.encode(read_work(root, self.text, work)).ids, work, number, self.length)
            for work, number in ((self.fit, self.num_fit), (self.test, self.num_test))
        )
        return LanguageSubject(loaded.model, fit, test)


class LanguageSubject(AbstractSubject):
    """Scored by perplexity a token of the test windows, each token but a window's first."""

    metric = "perplexity"
    higher_is_better = False

    def __init__(self, model, fit: Sequence[Tensor], test: Sequence[Tensor]) -> None:  # noqa: ANN001 - a Decoder
        self.model = model
        self.fit = [Batch(ids[None], None) for ids in fit]
        self.test = [Batch(ids[None], None) for ids in test]

    def digest(self, output: Tensor, place: int) -> Tensor:
        ids = self.test[place].input_ids
        return F.cross_entropy(output[0, :-1], ids[0, 1:], reduction="none")

    def score(self, digests: Sequence[Tensor]) -> float:
        # Means beyond this are no better known than that they are hopeless, and JSON holds no infinity.
        return math.exp(min(float(torch.cat(list(digests)).double().mean()), 700.0))


def _windows(ids: Sequence[int], work: str, number: int, length: int) -> list[Tensor]:
    if len(ids) < number * length:
        raise ValueError(
            f"`{work}` has {len(ids)} tokens, which are no {number} windows of {length}: ask for fewer or shorter ones"
        )
    return list(torch.tensor(ids[: number * length]).split(length))
