"""One seed: what it writes, that it repeats to the byte, and that it goes on after an interruption to the byte."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from attnlens.training import seed as seeds
from attnlens.training.callbacks import Checkpoint
from attnlens.training.seed import run_seed

SCRIPT = Path(__file__).resolve().parents[2] / "pipelines" / "train.py"
FILES = {"model.safetensors", "config.yaml", "curve.csv", "metrics.json", "scores.npy", "qkv.safetensors"}


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def fresh(job, name):
    """The results of an uninterrupted run of `job` that knows nothing of earlier ones."""
    results = contents(run_seed(job).results)
    Path("outputs").rename(name)
    return results


def test_the_files_say_what_happened(study):
    outcome = run_seed(study("training.validation_every=8"))
    files = contents(outcome.results)
    metrics, scores = json.loads(files["metrics.json"]), np.load(Path(outcome.results) / "scores.npy")
    assert files.keys() == FILES
    assert metrics["value"] == pytest.approx(scores.mean(), abs=1e-12)
    assert metrics["value"] == metrics["slices"]["2"]
    assert metrics["num_examples"] == len(scores) == 24
    rows = files["curve.csv"].decode().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "8", "16", "20"]
    assert all(math.isfinite(float(cell)) for row in rows[1:] for cell in row.split(","))
    written = OmegaConf.create(files["config.yaml"].decode())
    assert (written.data, written.attention_name, written.seed, written.training.steps) == ("mqar", "softmax", 0, 20)
    assert str(Path.cwd()) not in files["config.yaml"].decode()
    assert outcome.parameters == sum(tensor.numel() for tensor in tensors(outcome, "model").values())


def tensors(outcome, name):
    with safe_open(Path(outcome.results) / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def test_captured_tensors_are_what_the_operator_receives(study):
    """Running the operator on them, and the model's weights on that, gives the model's own next layer input."""
    outcome = run_seed(study())
    captured, weights = tensors(outcome, "qkv"), tensors(outcome, "model")
    assert captured.keys() == {f"layer{layer}.{name}" for layer in (0, 1) for name in "qkv"}
    assert captured["layer0.q"].shape == (4, 2, 16, 8)
    with safe_open(Path(outcome.results) / "qkv.safetensors", framework="pt") as file:
        assert file.metadata() == {"causal": "false"}
    # By hand, layer 0 only: embedding, norm, linear map, short convolution. The first two slices hold 24 examples
    # each and the headline is the second, so the first captured example is number 24 of the test split.
    from attnlens.data.store import load_split

    x = weights["embedding.weight"][torch.as_tensor(load_split(Path("data/prepared/mqar"), "test")["input_ids"][24:28])]
    norm = [weights[f"blocks.0.norms.0.{name}"] for name in ("weight", "bias")]
    z = torch.nn.functional.layer_norm(x, (16,), *norm) @ weights["blocks.0.projection.inputs.2.weight"].T
    taps = weights["blocks.0.projection.convolutions.2.weight"]
    shifted = [torch.nn.functional.pad(z, (0, 0, lag, 0))[:, :16] for lag in range(3)]
    v = sum(tap * part for tap, part in zip(taps, shifted, strict=True)).unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(captured["layer0.v"], v, rtol=1e-4, atol=1e-5)


def test_two_runs_are_equal_to_the_byte_and_seeds_differ(study):
    first = fresh(study(attention="performer"), "one")
    assert fresh(study(attention="performer"), "two") == first
    other = contents(run_seed(study(attention="performer", seed=1)).results)
    assert other["model.safetensors"] != first["model.safetensors"]


# Before, on and between validations (every 8 steps), and at the last step: the loops stand in different places there.
@pytest.mark.parametrize("step", [3, 8, 11, 20])
def test_an_interrupted_run_goes_on_to_the_byte(study, monkeypatch, capsys, step):
    job = study("model.block.dropout=0.1", "training.validation_every=8", f"training.checkpoint_every={step}")
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


def test_kill_and_resume_gives_the_same_bytes(study):
    """The whole command is killed with SIGKILL in the middle of training; its workers go with it."""
    overrides = ["model.block.dropout=0.1", "training.steps=250", "training.checkpoint_every=20"]
    job = study(*overrides)
    command = [sys.executable, str(SCRIPT), "experiment=mqar", "model.width=16", "training.batch_size=8"]
    command += ["training.warmup_steps=5", "trainer=cpu", "logger=csv", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = next((line for line in process.stdout if "step 75/" in line), "")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert line, process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    [checkpoint] = Path("outputs/checkpoints").rglob("last.ckpt")
    time.sleep(1)
    steps = [torch.load(checkpoint, weights_only=True)["global_step"]]
    time.sleep(1)
    steps.append(torch.load(checkpoint, weights_only=True)["global_step"])
    assert 0 < steps[0] == steps[1] < 250, "the worker went on without its parent"
    resumed = fresh(job, "resumed")
    assert fresh(job, "whole") == resumed


def test_another_config_starts_over_and_says_so(study, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="interrupted"):
        patch.setattr(seeds, "examine", interrupt)
        run_seed(study())
    run_seed(study("training.learning_rate=0.001"))
    said = capsys.readouterr().out
    assert "starting over" in said
    assert "resuming" not in said
    run_seed(study())
    assert "resuming at step 20" in capsys.readouterr().out


def interrupt(*_, **__):
    raise RuntimeError("interrupted")


def test_a_non_causal_operator_on_causal_data_is_found_before_training(study, capsys):
    outcome = run_seed(study(data="mqar_causal", attention="nystromformer"))
    assert outcome.results is None
    assert "`causal=True` is not possible with Nystromformer" in outcome.reason
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["steps", "checkpoint_every"])
def test_a_value_out_of_range_is_named(study, name):
    with pytest.raises(ValueError, match=rf"`training.{name}` must be at least 1, got 0"):
        run_seed(study(f"training.{name}=0"))


def test_softmax_learns_and_mean_does_not(study, tmp_path):
    """Recall with 4 pairs: guessing among them gives 1/4."""
    from tests.training.conftest import prepare

    sizes = {"length": 24, "vocabulary_size": 24, "num_pairs": [4], "test_num_pairs": [4], "headline": 4}
    prepare(tmp_path, **sizes, num_train=6400, num_test=64)
    recipe = ["model.width=32", "training.batch_size=32", "training.steps=150", "training.warmup_steps=30"]
    values = {}
    for attention in ("softmax", "mean"):
        outcome = run_seed(study(*recipe, attention=attention))
        values[attention] = json.loads(contents(outcome.results)["metrics.json"])["value"]
    assert values["softmax"] > 0.99
    assert values["mean"] < 0.5
