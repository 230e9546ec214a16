"""Pairs: what is decoded is what the model says without a cache, errors are counted over it, and runs resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from attnlens.data.module import DataModule, without_padding
from attnlens.data.store import IGNORED
from attnlens.models.build import build_model
from attnlens.training import seed as seeds
from attnlens.training.callbacks import Checkpoint
from attnlens.training.decode import check_decoding, decode, decoded_rates, references
from attnlens.training.evaluate import evaluate, examine
from attnlens.training.objective import forced_error, predict, scored
from attnlens.training.seed import run_seed
from tests.training.pairs import prepare_pairs
from tests.training.test_seed import contents, fresh

SMALL = ("model.num_heads=2", "training.steps=12", "training.validation_every=5", "decoding.beam_width=2")


@pytest.fixture
def pairs(study, tmp_path):
    """A random model of pairs, its data and a job that would train it."""
    prepare_pairs(tmp_path)
    job = study(*SMALL, data="cmudict")
    data = DataModule("data/prepared/cmudict", batch_size=8, seed=0, evaluation_batch_size=16)
    model = build_model(OmegaConf.create(dict(job.config)), data.meta, seed=0)
    return model.eval(), data, job


def uncached(model, batch, meta) -> list[list[int]]:
    """Greedy by definition: the whole model again for every token."""
    found = []
    for row in range(len(batch["input_ids"])):
        inputs = batch["input_ids"][row : row + 1][:, batch["attention_mask"][row]]
        ids = [meta["begin"]]
        while len(ids) <= meta["target_length"]:
            logits = model(inputs, target_ids=torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == meta["end"]:
                break
        found.append([token for token in ids[1:] if token != meta["end"]])
    return found


@torch.no_grad()
def test_greedy_decoding_is_that_of_the_model_without_cache_and_padding(pairs):
    model, data, _ = pairs
    batch = data.examples("test").__getitems__(list(range(20)))
    found = decode(model, batch, data.meta, decoding=None)
    assert found == uncached(model, batch, data.meta)
    assert decode(model, batch, data.meta, decoding={"beam_width": 1, "length_penalty": 0.0}) == found


def test_references_are_the_targets_of_the_data(pairs):
    _, data, _ = pairs
    labels = data.examples("test").columns["labels"].numpy()
    said = [[row[(row != IGNORED) & (row != 0)].tolist()] for row in labels]
    assert references(data, "test") == said


def test_the_rates_of_a_perfect_and_of_a_silent_model(pairs, monkeypatch):
    model, data, _ = pairs
    truth = iter([several[0] for several in references(data, "test")])
    name = "attnlens.training.decode.decode"
    monkeypatch.setattr(name, lambda model, batch, meta, decoding: [next(truth) for _ in batch["input_ids"]])
    assert decoded_rates(model, data, decoding=None).scores.sum() == 0
    monkeypatch.setattr(name, lambda model, batch, meta, decoding: [[] for _ in batch["input_ids"]])
    silent = decoded_rates(model, data, decoding=None)
    assert silent.scores.mean() == pytest.approx(1)
    assert silent.wrong.all()


@torch.no_grad()
def test_a_batch_without_padding_has_equal_logits(pairs):
    model, data, _ = pairs
    rows = data.examples("train").columns["attention_mask"].sum(1)
    whole = data.examples("train").__getitems__(np.flatnonzero(rows.numpy() <= 3)[:8].tolist())
    short = without_padding(whole)
    source, target = short["input_ids"].shape[1], short["labels"].shape[1]
    assert (source, target) == (3, 5)
    assert (whole["labels"][:, target:] == IGNORED).all()
    torch.testing.assert_close(predict(model, short), predict(model, whole)[:, :target], rtol=1e-5, atol=1e-5)


def test_forced_error_is_the_share_of_wrong_labels(pairs):
    logits = torch.eye(3)[torch.tensor([[0, 1, 2, 0], [1, 1, 1, 1]])]
    labels = torch.tensor([[0, 2, 2, IGNORED], [0, IGNORED, IGNORED, IGNORED]])
    torch.testing.assert_close(forced_error(logits, labels), torch.tensor([1 / 3, 1.0], dtype=torch.float64))
    _, data, _ = pairs
    assert scored(data.meta) == "forced_error"


def test_the_test_reports_greedy_and_beam_and_validation_does_not_decode(pairs):
    model, data, job = pairs
    result = examine(model, data, decoding=job.config["decoding"])
    greedy = decoded_rates(model, data, decoding=None)
    assert result.metric == "phoneme_error_rate"
    assert result.value == pytest.approx(greedy.scores.mean())
    assert result.decoded["word_error_rate"] == greedy.wrong.mean()
    assert result.decoded.keys() == {
        "word_error_rate",
        "beam_phoneme_error_rate",
        "beam_word_error_rate",
        "beam_width",
    }
    assert evaluate(model, data, split="validation").metric == "forced_error"


@pytest.mark.parametrize("step", [3, 5, 12])
def test_an_interrupted_run_of_pairs_goes_on_to_the_byte(pairs, study, monkeypatch, capsys, step):
    job = study(*SMALL, "model.block.dropout=0.1", f"training.checkpoint_every={step}", data="cmudict")
    expected = fresh(job, "whole")
    write = Checkpoint._write

    def write_and_fail(self, trainer):
        write(self, trainer)
        if trainer.global_step == step:
            raise RuntimeError("interrupted")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="interrupted"):
        patch.setattr(Checkpoint, "_write", write_and_fail)
        run_seed(job)
    assert contents(run_seed(job).results) == expected
    assert f"resuming at step {step}" in capsys.readouterr().out
    metrics = json.loads(expected["metrics.json"])
    assert metrics["decoded"]["beam_width"] == 2


def test_pairs_are_learned(study, tmp_path):
    prepare_pairs(tmp_path, num_train=2000)
    recipe = ["model.width=32", "training.batch_size=32", "training.steps=250", "training.learning_rate=0.01"]
    job = study("model.num_heads=2", *recipe, data="cmudict")
    metrics = json.loads((Path(run_seed(job).results) / "metrics.json").read_text())
    assert metrics["value"] < 0.05
    assert metrics["decoded"]["beam_word_error_rate"] < 0.2


@pytest.mark.parametrize(
    ("decoding", "task", "message"),
    [
        ({"beam_width": 2}, "tokens", "`decoding` has no effect on toy"),
        (None, "seq2seq", "`decoding` is null, but toy has sequences"),
        ({"beam_width": 0}, "seq2seq", "`decoding.beam_width` must be at least 1 .*got 0"),
    ],
)
def test_a_decoding_that_does_not_fit_is_refused(decoding, task, message):
    with pytest.raises(ValueError, match=message):
        check_decoding(decoding, {"task": task, "data": "toy"})


def test_it_is_refused_before_training(pairs, study, monkeypatch):
    monkeypatch.setattr(seeds, "fit", lambda *_: pytest.fail("training began"))
    with pytest.raises(ValueError, match="`decoding` is null"):
        run_seed(study(*SMALL[:-1], "decoding=null", data="cmudict"))
