"""The one LightningModule: any model of attnlens.models on any prepared data set."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from attnlens.attention.build import derived_seed
from attnlens.models.base import AbstractModel
from attnlens.training.objective import cross_entropy, predict, scored, scorer

# The stream of random numbers for what training itself draws (dropout); see attnlens.models.build.WEIGHTS.
NOISE = 2**32 - 2


class CurveRow(NamedTuple):
    """One row of the learning curve; `train_loss` is the mean since the row before."""

    step: int
    train_loss: float
    validation_loss: float
    validation_metric: float


class Learner(pl.LightningModule):
    """Cross entropy with AdamW, a linear warm-up and a linear decay.

    Args:
        model: to be trained.
        meta: of the data, as `prepare` wrote it.
        training: the config's section of that name.
        seed: of the noise in training. The noise of a step is a function of (seed, step, rank), as its batch is,
            so that a resumed run has no state of a generator to restore.

    Raises:
        ValueError: a number of steps or a rate that is out of range.
    """

    def __init__(self, model: AbstractModel, meta: Mapping, training: DictConfig, *, seed: int) -> None:
        super().__init__()
        _check(training)
        self.model, self.meta, self.training_config, self.seed = model, meta, training, seed
        self.score = scorer(meta, "validation")
        self.curve: list[CurveRow] = []
        self._losses: list[Tensor] = []
        self._validation: list[tuple[Tensor, Tensor, int]] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return predict(self.model, batch)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        torch.manual_seed(derived_seed(self.seed, NOISE, (str(self.global_step), str(self.global_rank))))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch), batch["labels"])
        self._losses.append(loss.detach())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits, labels = self(batch), batch["labels"]
        scores = self.score(logits, labels)
        self._validation.append((cross_entropy(logits, labels).double() * len(labels), scores.sum(), len(labels)))

    def on_validation_epoch_end(self) -> None:
        losses, scores, sizes = zip(*self._validation, strict=True)
        total = sum(sizes)
        self._validation.clear()
        train_loss = self.trainer.strategy.reduce(self.mean_loss(), reduce_op="mean")
        loss, metric = (float(torch.stack(values).sum()) / total for values in (losses, scores))
        self.curve.append(CurveRow(self.global_step, float(train_loss), loss, metric))
        self._losses.clear()
        self.log_dict({"validation_loss": loss, f"validation_{scored(self.meta)}": metric})

    def mean_loss(self) -> Tensor:
        """Of the training steps since the last row of the curve."""
        return torch.stack(self._losses).mean() if self._losses else torch.tensor(float("nan"))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.training_config
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=tuple(config.betas),
            weight_decay=config.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = [tuple(row) for row in self.curve]
        checkpoint["losses"] = [float(loss) for loss in self._losses]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve = [CurveRow(*row) for row in checkpoint["curve"]]
        self._losses = [torch.tensor(loss, device=self.device) for loss in checkpoint["losses"]]


def _check(training: DictConfig) -> None:
    least = {"steps": 1, "validation_every": 1, "checkpoint_every": 1, "warmup_steps": 0, "learning_rate": 0}
    for name, bound in {**least, "weight_decay": 0, "gradient_clip": 0, "final_fraction": 0}.items():
        if training[name] < bound:
            raise ValueError(f"`training.{name}` must be at least {bound}, got {training[name]}")
    if training.final_fraction > 1:
        raise ValueError(f"`training.final_fraction` must be at most 1, got {training.final_fraction}")


def rate(step: int, training: DictConfig) -> float:
    """The learning rate of a step over the highest: linear from 0, then linear to `final_fraction` at the end."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    rest = max(1, training.steps - training.warmup_steps)
    return 1 - (1 - training.final_fraction) * min(1.0, (step - training.warmup_steps) / rest)
