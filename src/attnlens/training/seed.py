"""One seed of a cell, start to finish: resume or start, train, test, and leave a folder of results."""

import hashlib
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_model

from attnlens import tracking
from attnlens.construct import construct
from attnlens.data.integrity import sha256
from attnlens.data.module import DataModule
from attnlens.files import atomic, write_json
from attnlens.models.base import AbstractModel
from attnlens.models.build import build_model, build_operator, refusal, runs_causally
from attnlens.training.callbacks import Checkpoint, Progress
from attnlens.training.capture import save_capture
from attnlens.training.decode import check_decoding
from attnlens.training.evaluate import Result, evaluate, examine
from attnlens.training.initial import initial_file, load_initial
from attnlens.training.job import Job, Outcome
from attnlens.training.learner import CurveRow, Learner

# The sections of the config that decide the weights; the others say where things go and who watches.
SECTIONS = ("attention", "projection", "position", "model", "training", "decoding", "trainer", "capture")


def run_seed(job: Job) -> Outcome:
    """Train and test on one thread; an unfinished run of this config on this data is continued where it was."""
    config = OmegaConf.create(dict(job.config))
    _quiet()
    torch.set_num_threads(1)
    data = DataModule(f"data/prepared/{job.data}", batch_size=config.training.batch_size, seed=job.seed)
    check_decoding(config.decoding, data.meta)
    operator = build_operator(config, data.meta, seed=job.seed)
    reason = refusal(operator, causal=runs_causally(config))
    if reason is not None:
        print(f"{job.label}: not applicable: {reason}", flush=True)
        return Outcome(None, 0, reason)
    model = build_model(config, data.meta, seed=job.seed)
    begun = _begin(job, config, model)
    resolved = resolve(job)
    workspace = _workspace(job, resolved, {**data.meta["files"], **begun})
    results = workspace / "results"
    parameters = sum(weights.numel() for weights in model.parameters())
    if not results.is_dir():
        with tracking.run(
            job_type="train",
            name=f"{job.data}-{job.attention}-seed{job.seed}",
            group=config.study,
            config={**resolved, "parameters": parameters},
            folder=Path(job.folder) / "tracking" / f"seed{job.seed}",
            logger=job.config["logger"],
        ) as run:
            learner = fit(job, config, model, data, workspace / "last.ckpt", run)
            result = examine(model, data, decoding=config.decoding)
            _write(results, job, learner, result, resolved, data)
            _report(run, job, result, data, results)
        print(f"{job.label}: {data.meta['metric']} {result.value:.4f}", flush=True)
    return Outcome(str(results), parameters, None)


def _begin(job: Job, config: DictConfig, model: AbstractModel) -> dict[str, str]:
    """Give `model` the weights of `training.initial`; the hash of their file, if there is one."""
    if config.training.initial is None:
        return {}
    file = initial_file(config.training.initial, job.seed)
    initial = load_initial(model, file)
    new = ", ".join(initial.new) or "none"
    print(f"{job.label}: {len(initial.loaded)} tensors from {file}; new: {new}", flush=True)
    return {"initial": sha256(file)}


def resolve(job: Job) -> dict[str, Any]:
    """The part of the config that decides the result; no path and no host is in it."""
    names = {"data": job.data, "attention_name": job.attention, "seed": job.seed}
    return {**names, **{section: job.config[section] for section in SECTIONS}}


def fit(
    job: Job, config: DictConfig, model: AbstractModel, data: DataModule, checkpoint: Path, run: tracking.AbstractRun
) -> Learner:
    """Train `model` in place to the configured number of steps, from `checkpoint` if it is there."""
    steps, every = config.training.steps, min(config.training.validation_every, config.training.steps)
    learner = Learner(model, data.meta, config.training, seed=job.seed)
    start = torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.is_file() else 0
    if start:
        print(f"{job.label}: resuming at step {start}", flush=True)
    if start < steps:
        saver = Checkpoint(checkpoint, every=config.training.checkpoint_every, validation_every=every, steps=steps)
        trainer = construct(
            config.trainer,
            {
                "max_steps": steps,
                "max_epochs": -1,
                "logger": run.lightning(),
                "callbacks": [Progress(job.label, steps), saver],
                "gradient_clip_val": config.training.gradient_clip,
                "val_check_interval": every,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 10,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
            },
        )
        trainer.fit(learner, datamodule=data, ckpt_path=checkpoint if start else None, weights_only=True)
    # The last checkpoint is what was trained, also where the training processes were others than this one.
    final = torch.load(checkpoint, weights_only=True, map_location="cpu")
    learner.cpu().load_state_dict(final["state_dict"])
    learner.on_load_checkpoint(final)
    _close_curve(learner, data, steps)
    return learner


def _close_curve(learner: Learner, data: DataModule, steps: int) -> None:
    """The last step has a row of its own, also where no validation was due."""
    if not learner.curve or learner.curve[-1].step < steps:
        result = evaluate(learner.model, data, split="validation")
        learner.curve.append(CurveRow(steps, float(learner.mean_loss()), result.loss, result.value))


def _workspace(job: Job, resolved: Mapping[str, Any], files: Mapping[str, str]) -> Path:
    """The folder in which this config on these files goes on; another config, or other code, has another one."""
    content = OmegaConf.to_yaml(resolved) + str(sorted(files.items())) + _code()
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    parent = Path("outputs/checkpoints") / job.data / job.attention / f"seed{job.seed}"
    if not (parent / digest).exists() and parent.is_dir() and any(parent.iterdir()):
        print(f"{job.label}: an unfinished run in {parent} had another config, data or code: starting over", flush=True)
    (parent / digest).mkdir(parents=True, exist_ok=True)
    return parent / digest


def _code() -> str:
    """A hash of the package: weights half trained by older code must not be continued by newer."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _write(
    folder: Path,
    job: Job,
    learner: Learner,
    result: Result,
    resolved: Mapping[str, Any],
    data: DataModule,
) -> None:
    with atomic(folder) as aside:
        aside.mkdir()
        save_model(learner.model, str(aside / "model.safetensors"))
        OmegaConf.save(OmegaConf.create(dict(resolved)), aside / "config.yaml")
        rows = [",".join(CurveRow._fields), *(",".join(map(repr, row)) for row in learner.curve)]
        (aside / "curve.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        write_json(aside / "metrics.json", {**result.metrics(), "steps": learner.training_config.steps})
        np.save(aside / "scores.npy", result.scores)
        first = result.examples[: job.config["capture"]["num_examples"]]
        save_capture(aside / "qkv.safetensors", learner.model, data.examples("test").__getitems__(first.tolist()))


def _report(run: tracking.AbstractRun, job: Job, result: Result, data: DataModule, results: Path) -> None:
    metrics = result.metrics()
    slices = {f"test_{result.metric}_{name}": value for name, value in (result.slices or {}).items()}
    decoded = {f"test_{name}": value for name, value in (result.decoded or {}).items()}
    run.summary({f"test_{result.metric}": result.value, **slices, **decoded})
    run.artifact(job.data, "dataset", [data.folder / "meta.json"], {"files": data.meta["files"]})
    name = f"{job.data}-{job.attention}-seed{job.seed}"
    run.artifact(name, "model", [results / "model.safetensors", results / "config.yaml"], metrics)


def _quiet() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Arguments for workers that would load data from disk; here it is in memory and a batch is one index.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning asks torch a question in an old way, once a process.
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
