"""What operators are substituted into: a trained model, texts to fit and to test on, and a score."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from attnlens.models.base import AbstractStack


class Batch(NamedTuple):
    """Token ids (b, n) and which of them are real (None: all)."""

    input_ids: Tensor
    mask: Tensor | None


class AbstractSubject(ABC):
    """A loaded subject.

    Attributes:
        model: trained with exact attention, in evaluation mode.
        fit: batches on which operators are calibrated and matched; none of their text is in `test`.
        test: batches that are scored.

    Declared on the class:
        metric, higher_is_better: of `score`.
    """

    metric: str
    higher_is_better: bool
    model: AbstractStack
    fit: list[Batch]
    test: list[Batch]

    @abstractmethod
    def digest(self, output: Tensor, place: int) -> Tensor:
        """What the score needs of the model's output on test batch `place`: a small tensor."""

    @abstractmethod
    def score(self, digests: Sequence[Tensor]) -> float:
        """The metric from the digests of all test batches, in order."""


class AbstractSource(ABC):
    """A file of conf/subject: which model on which text."""

    @abstractmethod
    def load(self, root: Path) -> AbstractSubject:
        """Read model and text below the study's folder.

        Raises:
            ValueError: something has not been fetched, prepared or trained; the message names the command.
        """
