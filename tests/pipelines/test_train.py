"""The train stage as its user runs it: sweeps, names, what W&B holds of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException

from tests.training.conftest import prepare
from tests.training.pairs import prepare_pairs

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model.width=16", "training.batch_size=8", "training.warmup_steps=5", "training.steps=20"]


def train(folder, *words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, str(ROOT / "pipelines" / "train.py"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def inspect(path, *flags):
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", *flags, "--json", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_sweep_has_a_folder_and_a_finished_offline_run_for_each_job(tmp_path):
    prepare(tmp_path)
    words = ["-m", "experiment=mqar", "attention=mean,nystromformer", "seed=0", "study=toy", "hydra/launcher=joblib"]
    done = train(tmp_path, *words, "training.validation_every=10", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = sorted((tmp_path / "outputs").rglob("cell.json"))
    assert [json.loads(cell.read_text())["attention"] for cell in cells] == ["mean", "nystromformer"]
    assert all((cell.parent / "seed0" / "model.safetensors").is_file() for cell in cells)
    runs = sorted((tmp_path / "outputs").rglob("*.wandb"))
    assert len(runs) == 2
    for path, cell in zip(runs, cells, strict=True):
        check_run(path, json.loads((cell.parent / "seed0" / "metrics.json").read_text()))


def check_run(path, metrics):
    summary = json.loads(inspect(path, "--summary"))
    assert summary["state"] == "finished"
    assert summary["config"]["training"]["steps"] == 20
    assert summary["summary"]["test_accuracy"] == pytest.approx(metrics["value"])
    records = [json.loads(line) for line in inspect(path).splitlines()]
    [run] = [record["run"] for record in records if record["type"] == "run"]
    assert (run["run_group"], run["job_type"]) == ("toy", "train")
    history = [record["history"] for record in records if record["type"] == "history"]
    keys = [key for row in history for key in row.get("item", row)]
    assert keys.count("validation_accuracy") == 2
    assert keys.count("train_loss") == 2
    artifacts = {record["artifact"]["type"] for record in records if record["type"] == "artifact"}
    assert {"dataset", "model"} <= artifacts


@pytest.mark.parametrize(("word", "choice"), [("attention=sotfmax", "softmax"), ("experiment=mqr", "mqar_causal")])
def test_an_unknown_name_lists_the_choices(word, choice):
    with (
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
        pytest.raises(MissingConfigException, match=rf"(?s)Available options.*{choice}"),
    ):
        compose("train", [word])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_takes_a_step(name, tmp_path, monkeypatch):
    """On data of the shapes that its data set has, since the data itself is made by another stage."""
    import torch
    from omegaconf import OmegaConf

    from attnlens.training.job import Job
    from attnlens.training.seed import run_seed

    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [f"experiment={name}", "training.steps=1", "training.batch_size=4", "logger=csv"])
    if config.model._target_.endswith("Seq2Seq"):
        prepare_pairs(tmp_path, name=name)
    else:
        prepare_shapes(tmp_path, name, config)
    outcome = run_seed(Job(OmegaConf.to_container(config, resolve=True), name, "softmax", 0, "outputs/run"))
    torch.use_deterministic_algorithms(False)
    assert json.loads((Path(outcome.results) / "metrics.json").read_text())["steps"] == 1


def prepare_shapes(root, name, config):
    """Random data with the labels that the head of `config` gives."""
    import numpy as np

    from attnlens.data.store import Meta, Prepared, save

    classify, text = name in ("digits", "shakespeare_genre"), name.startswith("shakespeare") and "genre" not in name
    meta = Meta(
        task="classification" if classify else "tokens",
        objective="classification" if classify else "next_token",
        causal=config.model._target_.endswith("Decoder"),
        vocabulary_size=20,
        num_outputs=10,
        length=64,
        metric="bits_per_character" if text else "accuracy",
        higher_is_better=not text,
        characters_per_token=1.0 if text else None,
    )
    rng = np.random.default_rng(0)
    columns = {
        "input_ids": rng.integers(20, size=(8, 64), dtype=np.int32),
        "labels": rng.integers(10, size=8 if classify else (8, 64), dtype=np.int32),
    }
    save(Prepared(dict.fromkeys(("train", "validation", "test"), columns), meta), root / "data/prepared" / name)
