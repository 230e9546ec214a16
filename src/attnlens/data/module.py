"""One Lightning data module for every prepared data set, whose training batches are addressed by step.

Batch t is a pure function of (seed, t): epoch e reads the permutation drawn from (seed, e). A run that was killed and
resumed at step t therefore reads what an uninterrupted run reads, with no sampler state to restore, and so does a run
on another number of devices, each of which takes its share of the same batch.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from attnlens.data.store import IGNORED, SPLITS, load_meta, load_split

# Of which a batch of like lengths is drawn: a heuristic between little padding and batches of one kind.
_SORTED_BATCHES = 64


class DataModule(LightningDataModule):
    """Serves batches of the prepared folder as dicts of tensors: `input_ids` and `labels` int64 (batch, length), or
    `labels` (batch,) for classification; `attention_mask` bool and `slice` int64 where the data has them. Pairs of
    sequences have `target_ids` and `labels` (batch, target_length) and, held out, `references`; their batches are cut
    to the longest of each, and a training batch holds sources of about one length.

    Training never ends by itself: the trainer's `max_steps` says when. Under several devices give the trainer
    `use_distributed_sampler=False`; the batch size counts the examples of all devices together.

    Args:
        folder: data/prepared/<name>.
        batch_size: training examples per step.
        seed: of the order in which training examples are read.
        start_step: batches already read; set by itself when a checkpoint is loaded.
        evaluation_batch_size: examples per batch of validation and test, read in order.

    Raises:
        ValueError: the folder is missing or damaged, or a batch is larger than the training split.
    """

    def __init__(
        self, folder: Path | str, *, batch_size: int, seed: int, start_step: int = 0, evaluation_batch_size: int = 256
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.meta = load_meta(self.folder)
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.seed = seed
        self.start_step = start_step
        self._examples: dict[str, Examples] = {}

    def examples(self, split: str) -> "Examples":
        """A whole split in memory.

        Raises:
            ValueError: an unknown split.
        """
        if split not in self._examples:
            self._examples[split] = Examples(load_split(self.folder, split))
        return self._examples[split]

    def setup(self, stage: str | None = None) -> None:
        """Read what `stage` needs before any loop starts: everything but the test split for fitting."""
        for split in {"fit": SPLITS[:2], "validate": SPLITS[1:2], "test": SPLITS[2:]}.get(str(stage), SPLITS):
            self.examples(split)

    def train_dataloader(self) -> DataLoader:
        """Batches `start_step`, `start_step` + 1, ... without end; this device's share of each."""
        examples = self.examples("train")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = StepBatches(
            len(examples),
            self.batch_size,
            self.seed,
            start_step=self.start_step,
            rank=rank,
            world_size=world_size,
            lengths=examples.columns["attention_mask"].sum(1).numpy() if self._pairs else None,
        )
        return DataLoader(examples, batch_sampler=batches, collate_fn=self._collate)

    def val_dataloader(self) -> DataLoader:
        """The validation split in order."""
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader:
        """The test split in order."""
        return self._in_order("test")

    def state_dict(self) -> dict[str, int]:
        """For Lightning's checkpoint: how many training batches were read."""
        if self.trainer is None:
            return {"step": self.start_step}
        return {"step": self.trainer.global_step * self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the batches that the checkpoint's run had read."""
        self.start_step = state_dict["step"]

    def _in_order(self, split: str) -> DataLoader:
        examples = self.examples(split)
        starts = range(0, len(examples), self.evaluation_batch_size)
        batches = [list(range(len(examples)))[start : start + self.evaluation_batch_size] for start in starts]
        return DataLoader(examples, batch_sampler=batches, collate_fn=self._collate)

    @property
    def _pairs(self) -> bool:
        return self.meta["task"] == "seq2seq"

    @property
    def _collate(self) -> Callable[[Any], Any]:
        return without_padding if self._pairs else _as_it_is


class Examples(Dataset):
    """A split as tensors of shape (examples, ...), indexed by many rows at once."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        # 32 bits in memory, 64 in a batch: embeddings and losses ask for int64.
        self.columns = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices)
        return {
            name: column[rows].to(torch.bool if name == "attention_mask" else torch.int64)
            for name, column in self.columns.items()
        }


class StepBatches(Sampler[list[int]]):
    """Yields the indices of batch `start_step`, `start_step` + 1, ... without end.

    An epoch has floor(num_examples / batch_size) batches; what remains of its permutation is not read in it. Of each
    batch, rank r of a world of w devices takes places r, r + w, ...

    With `lengths`, each run of 64 batches of the permutation is sorted by length before it is cut into batches, whose
    order is then drawn anew: less padding, and still a function of (seed, step).

    Raises:
        ValueError: a batch larger than the data, or one that the devices cannot share evenly.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        *,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lengths: np.ndarray | None = None,
    ) -> None:
        if not 1 <= batch_size <= num_examples:
            raise ValueError(f"`batch_size` is {batch_size}: choose 1..{num_examples}, the size of the training split")
        if batch_size % world_size:
            raise ValueError(f"`batch_size` is {batch_size}: choose a multiple of the {world_size} devices")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size
        self.lengths = lengths
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Int64[Tensor, " batch"]:
        """Indices of the whole batch `step`."""
        epoch, place = divmod(step, self.num_examples // self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.from_numpy(self._permutation(epoch))
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.num_examples)
        if self.lengths is None:
            return order
        order = order[: self.num_examples // self.batch_size * self.batch_size]
        run = _SORTED_BATCHES * self.batch_size
        for start in range(0, len(order), run):
            part = order[start : start + run]
            order[start : start + run] = part[np.argsort(self.lengths[part], kind="stable")]
        return rng.permutation(order.reshape(-1, self.batch_size)).ravel()

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.batch(step)[self.rank :: self.world_size].tolist()
            step += 1


def without_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of pairs less the columns that are padding in every row of its sources, or of its targets."""
    source = int(batch["attention_mask"].sum(1).max())
    target = int((batch["labels"] != IGNORED).sum(1).max())
    ends = {"input_ids": source, "attention_mask": source, "target_ids": target, "labels": target}
    return {name: column[:, : ends[name]] if name in ends else column for name, column in batch.items()}


def _as_it_is(batch: Any) -> Any:
    """`Examples` answers with a finished batch; there is nothing to collate."""
    return batch
