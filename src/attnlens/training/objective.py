"""What is minimized and what is reported: cross entropy, accuracy, bits per character. Pure functions of tensors.

Error rates of sequences, which need decoding, are in `attnlens.training.decode`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.data.store import IGNORED


def predict(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of the model on the columns of a batch that are its inputs."""
    inputs = {"target_ids": batch["target_ids"]} if "target_ids" in batch else {}
    return model(batch["input_ids"], key_padding_mask=batch.get("attention_mask"), **inputs)


def cross_entropy(logits: Float[Tensor, "*axes c"], labels: Int[Tensor, "*axes"]) -> Float[Tensor, ""]:
    """Mean over all labels that are not ignored, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def accuracy(logits: Float[Tensor, "b *n c"], labels: Int[Tensor, "b *n"]) -> Float[Tensor, " b"]:
    """Fraction of each example's labels that have the largest logit; 0 for an example without labels."""
    asked = labels.flatten(1) != IGNORED if labels.ndim > 1 else torch.ones_like(labels, dtype=torch.bool)[:, None]
    right = (logits.argmax(-1) == labels).reshape(asked.shape) & asked
    return right.sum(1).double() / asked.sum(1).clamp(min=1)


def forced_error(logits: Float[Tensor, "b n c"], labels: Int[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Fraction of each example's labels that do not have the largest logit, each given the true ones before it.

    What a pair of sequences is watched by while it trains: no decoding, hence no error rate of the task.
    """
    return 1 - accuracy(logits, labels)


def bits(
    logits: Float[Tensor, "b *n c"],
    labels: Int[Tensor, "b *n"],
    *,
    characters_per_token: float,
    spelling: float = 0.0,
) -> Float[Tensor, " b"]:
    """Mean cross entropy of each example's labels in bits per character; 0 for an example without labels.

    `spelling` is the mean cost of the split's unknown words, which no logits know of.
    """
    rows = labels.shape[0]
    nats = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    asked = (labels != IGNORED).reshape(rows, -1).sum(1)
    mean = nats.reshape(rows, -1).double().sum(1) / asked.clamp(min=1)
    return mean / (math.log(2) * characters_per_token) + spelling


def scorer(meta: Mapping, split: str = "test") -> Callable[[Tensor, Tensor], Tensor]:
    """The function (logits, labels) -> score of each example of a split, whose mean is `scored(meta)`."""
    if meta["metric"] == "accuracy":
        return accuracy
    if meta["metric"] == "phoneme_error_rate":
        return forced_error
    spelling = meta.get("spelling") or {}
    return partial(bits, characters_per_token=meta["characters_per_token"], spelling=spelling.get(split, 0.0))


def scored(meta: Mapping) -> str:
    """Name of what `scorer` measures: the metric of `meta`, or what stands for it until sequences are decoded."""
    return "forced_error" if meta["metric"] == "phoneme_error_rate" else meta["metric"]
