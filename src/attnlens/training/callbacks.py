"""What happens beside training: a line of progress now and then, a checkpoint that a kill cannot spoil."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import STEP_OUTPUT


class Progress(pl.Callback):
    """Prints `label: step 100/300 loss 0.41` about ten times a run; log files have no use for a bar."""

    def __init__(self, label: str, steps: int) -> None:
        self.label, self.steps = label, steps
        self.every = max(1, steps // 10)
        self.start = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and (step % self.every == 0 or step == self.steps):
            seconds = time.monotonic() - self.start
            assert isinstance(outputs, Mapping), "Learner.training_step returns a loss"
            loss = float(outputs["loss"])
            print(f"{self.label}: step {step}/{self.steps} loss {loss:.4g} ({seconds:.0f} s)", flush=True)


class Checkpoint(pl.Callback):
    """Writes `path` every `every` steps and at the end, aside and then renamed, so that it is always a whole one.

    Where a validation follows the step, the checkpoint is written after it: a run that resumes from there would not
    make up for the validation.

    Args:
        path: of the one file.
        every: number of steps.
        validation_every: number of steps between validations.
        steps: at which training ends.
    """

    def __init__(self, path: Path, *, every: int, validation_every: int, steps: int) -> None:
        self.path, self.every, self.validation_every, self.steps = path, every, validation_every, steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step % self.validation_every:
            self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.global_step % self.every and trainer.global_step != self.steps:
            return
        aside = self.path.with_suffix(".writing")
        trainer.save_checkpoint(aside)
        if trainer.is_global_zero:
            os.replace(aside, self.path)
