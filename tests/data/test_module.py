"""Batches: a function of seed and step alone, whatever happened before and however many devices share them."""

import itertools

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from attnlens.data.module import DataModule, Examples, StepBatches
from attnlens.data.store import Meta, Prepared, save


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)

    def part(size: int) -> dict[str, np.ndarray]:
        ids = np.arange(size * 5).reshape(size, 5) % 100
        return {
            "input_ids": ids,
            "labels": rng.integers(3, size=size),
            "attention_mask": rng.integers(2, size=(size, 5)),
            "slice": np.arange(size),
        }

    meta = Meta("classification", "classification", False, 100, 3, 5, "accuracy", True)
    save(Prepared({"train": part(23), "validation": part(7), "test": part(9)}, meta), tmp_path / "toy")
    return tmp_path / "toy"


def take(module: DataModule, count: int) -> list[list[int]]:
    return [batch["slice"].tolist() for batch in itertools.islice(module.train_dataloader(), count)]


def test_batches_have_the_promised_types(folder):
    module = DataModule(folder, batch_size=4, seed=0)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (4, 5)),
        "labels": (torch.int64, (4,)),
        "attention_mask": (torch.bool, (4, 5)),
        "slice": (torch.int64, (4,)),
    }
    rows = module.examples("train").columns
    assert torch.equal(batch["input_ids"], rows["input_ids"][batch["slice"]].long())


@pytest.mark.parametrize("start", [0, 1, 5, 12, 100])
def test_starting_at_a_step_reads_what_an_uninterrupted_run_reads(folder, start):
    """The epoch has 5 batches of 4 (23 examples): starts inside, at the border of, and far behind an epoch."""
    whole = take(DataModule(folder, batch_size=4, seed=3), start + 12)
    assert take(DataModule(folder, batch_size=4, seed=3, start_step=start), 12) == whole[start:]


def test_an_epoch_reads_no_example_twice_and_epochs_and_seeds_differ(folder):
    batches = take(DataModule(folder, batch_size=4, seed=0), 10)
    first, second = (list(itertools.chain(*epoch)) for epoch in (batches[:5], batches[5:]))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert take(DataModule(folder, batch_size=4, seed=1), 5) != batches[:5]


def test_devices_share_the_same_batch():
    alone = StepBatches(40, 6, 0)
    shares = [iter(StepBatches(40, 6, 0, rank=rank, world_size=3)) for rank in range(3)]
    for step in range(15):
        parts = [next(share) for share in shares]
        assert sorted(itertools.chain(*parts)) == sorted(alone.batch(step).tolist())
        assert {len(part) for part in parts} == {2}


def test_evaluation_reads_everything_once_in_order(folder):
    module = DataModule(folder, batch_size=4, seed=0, evaluation_batch_size=4)
    module.setup()
    assert [batch["slice"].tolist() for batch in module.test_dataloader()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [len(batch["slice"]) for batch in module.val_dataloader()] == [4, 3]


class Recorder(LightningModule):
    """Notes which examples each training step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)
        self.seen: list[list[int]] = []

    def training_step(self, batch, index):
        self.seen.append(batch["slice"].tolist())
        return torch.nn.functional.cross_entropy(self.layer(batch["input_ids"].float()), batch["labels"])

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


# Lightning 2.6 with torch 2.13 warns of itself, and of the few workers that in-memory data needs.
@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:.*num_workers", "ignore:.*exists and is not empty"
)
def test_a_run_resumed_from_a_checkpoint_reads_on(folder, tmp_path):
    """Lightning resumes the step counter but starts the data anew; the module's own state puts that right."""

    def run(steps: int, resume: str | None = None) -> tuple[list[list[int]], str]:
        model, keep = Recorder(), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[keep],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=DataModule(folder, batch_size=4, seed=0), ckpt_path=resume, weights_only=False)
        return model.seen, keep.last_model_path

    before, checkpoint = run(7)
    after, _ = run(14, checkpoint)
    assert before + after == take(DataModule(folder, batch_size=4, seed=0), 14)


def test_examples_can_be_asked_for_one_by_one():
    examples = Examples({"input_ids": np.arange(6, dtype=np.int32).reshape(2, 3), "labels": np.asarray([0, 1])})
    assert len(examples) == 2
    assert examples[1]["input_ids"].tolist() == [3, 4, 5]
    assert examples[1]["labels"].item() == 1


def test_batches_that_do_not_fit_are_refused(folder):
    with pytest.raises(ValueError, match=r"`batch_size` is 24: choose 1..23"):
        DataModule(folder, batch_size=24, seed=0).train_dataloader()
    with pytest.raises(ValueError, match=r"`batch_size` is 5: choose a multiple of the 2 devices"):
        StepBatches(23, 5, 0, world_size=2)
    with pytest.raises(ValueError, match=r"prepare.py data=nothing"):
        DataModule(folder.parent / "nothing", batch_size=4, seed=0)


LENGTHS = np.random.default_rng(1).integers(1, 20, size=2050)


def test_batches_of_like_lengths_are_a_permutation_and_resume():
    def batches(start: int, count: int) -> list[list[int]]:
        return list(itertools.islice(StepBatches(2050, 8, 0, start_step=start, lengths=LENGTHS), count))

    whole = batches(0, 512)
    assert batches(100, 412) == whole[100:]
    for epoch in (whole[:256], whole[256:]):
        read = list(itertools.chain(*epoch))
        assert len(set(read)) == len(read) == 2048
        spans = [np.ptp(LENGTHS[batch]) for batch in epoch]
        assert np.mean(spans) < 1.5
    assert sorted(whole[0]) != sorted(whole[256])
    # The order of batches says nothing of their lengths.
    means = [LENGTHS[batch].mean() for batch in whole[:256]]
    assert abs(np.corrcoef(means, np.arange(256))[0, 1]) < 0.2


def test_devices_share_a_batch_of_like_lengths():
    parts = [StepBatches(2050, 8, 0, rank=rank, world_size=2, lengths=LENGTHS) for rank in (0, 1)]
    shares = [next(iter(part)) for part in parts]
    assert sorted([*shares[0], *shares[1]]) == sorted(StepBatches(2050, 8, 0, lengths=LENGTHS).batch(0).tolist())
