"""The test of a model: a score for each example, the metric, its slices."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from attnlens.data.module import DataModule
from attnlens.models.base import AbstractModel
from attnlens.models.seq2seq import Seq2Seq
from attnlens.training.decode import decoded_rates
from attnlens.training.objective import cross_entropy, predict, scored, scorer


class Result(NamedTuple):
    """What a split says about a model.

    Where the data has slices, the headline slice is what counts: `scores`, `value` and `examples` are its own, and
    `slices` has the metric of all.

    Attributes:
        metric, higher_is_better: from the data's description.
        value: the mean of `scores`.
        scores: (examples,) float64.
        examples: (examples,) their places in the split.
        slices: metric by value of the slice, or None.
        loss: mean cross entropy of the split in nats.
        decoded: further error rates of decoded sequences, or None.
    """

    metric: str
    higher_is_better: bool
    value: float
    scores: np.ndarray
    examples: np.ndarray
    slices: dict[str, float] | None
    loss: float
    decoded: dict[str, float] | None = None

    def metrics(self) -> dict[str, object]:
        """As it is written to metrics.json."""
        return {
            "metric": self.metric,
            "value": self.value,
            "higher_is_better": self.higher_is_better,
            "slices": self.slices,
            "num_examples": len(self.scores),
            **({} if self.decoded is None else {"decoded": self.decoded}),
        }


@torch.no_grad()
def evaluate(model: AbstractModel, data: DataModule, *, split: str = "test") -> Result:
    """Run the model over a split, on the device where it is; targets of pairs are given, not decoded."""
    device = next(model.parameters()).device
    score, scores, losses = scorer(data.meta, split), [], []
    training = model.training
    model.eval()
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    for batch in loader:
        batch = {name: column.to(device) for name, column in batch.items()}
        logits, labels = predict(model, batch), batch["labels"]
        scores.append(score(logits, labels).double().cpu().numpy())
        losses.append(cross_entropy(logits, labels).item() * len(labels))
    model.train(training)
    return _result(data.meta, np.concatenate(scores), data.examples(split).columns.get("slice"), sum(losses))


def examine(model: AbstractModel, data: DataModule, *, decoding: Mapping | None) -> Result:
    """What a trained model is reported by: `evaluate`, or the error rates of what it decodes.

    Scores are those of greedy decoding; the beam of `decoding`, and words beside phonemes, stand in `decoded`.
    """
    result = evaluate(model, data)
    if not isinstance(model, Seq2Seq):
        return result
    assert decoding is not None, "check_decoding has refused this"
    model.eval()
    greedy, beam = (decoded_rates(model, data, decoding=one) for one in (None, decoding))
    decoded = {
        "word_error_rate": float(greedy.wrong.mean()),
        "beam_phoneme_error_rate": float(beam.scores.mean()),
        "beam_word_error_rate": float(beam.wrong.mean()),
        "beam_width": decoding["beam_width"],
    }
    value = float(greedy.scores.mean())
    return result._replace(metric=data.meta["metric"], value=value, scores=greedy.scores, decoded=decoded)


def _result(meta: Mapping, scores: np.ndarray, column: torch.Tensor | None, loss: float) -> Result:
    loss, slices, examples = loss / len(scores), None, np.arange(len(scores))
    if meta["slices"] is not None and column is not None:
        values = column.numpy()
        slices = {str(value): float(scores[values == value].mean()) for value in np.unique(values)}
        if str(meta["slices"]["headline"]) in slices:
            examples = np.flatnonzero(values == meta["slices"]["headline"])
    scores = scores[examples]
    return Result(scored(meta), meta["higher_is_better"], float(scores.mean()), scores, examples, slices, loss)
