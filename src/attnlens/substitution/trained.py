"""A small model that the study has trained, on the test windows of its data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnlens.data.module import DataModule
from attnlens.models.base import AbstractStack
from attnlens.study import seed_file
from attnlens.substitution.subject import AbstractSource, AbstractSubject, Batch
from attnlens.training.load import load_trained
from attnlens.training.objective import scorer


@dataclass(frozen=True)
class TrainedCell(AbstractSource):
    """The reference model of one data set.

    Attributes:
        attention, data: name the cell.
        seed: which of its seeds.
        num_fit, num_test: examples of the validation and of the test split, from the first on.
        batch_size: of both.
    """

    attention: str
    data: str
    seed: int
    num_fit: int
    num_test: int
    batch_size: int

    def load(self, root: Path) -> "TrainedSubject":
        weights = seed_file(root, self.attention, self.data, self.seed, "model.safetensors")
        data = DataModule(root / "data/prepared" / self.data, batch_size=1, seed=0)
        model = load_trained(weights.parent, data.meta)
        if not isinstance(model, AbstractStack):
            raise ValueError(
                f"`data` {self.data} has a model of two stacks: name a data set with an encoder or a decoder"
            )
        return TrainedSubject(model, data, self)


class TrainedSubject(AbstractSubject):
    """Scored by the metric of its data."""

    def __init__(self, model: AbstractStack, data: DataModule, source: TrainedCell) -> None:
        self.model = model
        self.metric, self.higher_is_better = data.meta["metric"], data.meta["higher_is_better"]
        self.scores = scorer(data.meta)
        self.fit, _ = _batches(data, "validation", source.num_fit, source.batch_size)
        self.test, self.labels = _batches(data, "test", source.num_test, source.batch_size)

    def digest(self, output: Tensor, place: int) -> Tensor:
        return self.scores(output, self.labels[place])

    def score(self, digests: Sequence[Tensor]) -> float:
        return float(torch.cat(list(digests)).mean())


def _batches(data: DataModule, split: str, number: int, size: int) -> tuple[list[Batch], list[Tensor]]:
    examples = data.examples(split)
    batches, labels = [], []
    for start in range(0, min(number, len(examples)), size):
        rows = examples.__getitems__(list(range(start, min(start + size, number, len(examples)))))
        batches.append(Batch(rows["input_ids"], rows.get("attention_mask")))
        labels.append(rows["labels"])
    return batches, labels
