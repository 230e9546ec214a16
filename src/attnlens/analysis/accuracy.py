"""Test scores of every trained cell: means with intervals, and paired comparisons with the reference method."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from attnlens.analysis.statistics import Interval, holm, interval, verdict
from attnlens.files import read_json
from attnlens.study import Study, read_cell, seed_file

Row = dict[str, Any]

# What each metric can be.
BOUNDS = {"accuracy": (0.0, 1.0), "bits_per_character": (0.0, math.inf)}
# How far a metric may be from the mean of its scores: sums in float32.
AGREEMENT = 1e-4


def accuracy(
    study: Study,
    root: Path,
    *,
    confidence: float,
    margin: float,
    resamples: int,
    seed: int,
) -> list[Row]:
    """One row a cell of the study, as results/accuracy.json holds them, in the order of params.yaml.

    Args:
        study: the axes.
        root: the folder that holds models/ and data/.
        confidence: of the intervals; claims are made at the level 1 - confidence.
        margin: differences of the metric up to it count as equal.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: a cell of the study has not been trained; the message names the command.
    """
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    rows = []
    for data in study.data:
        scores = {attention: read_scores(root, attention, data, study.seeds) for attention in study.attention}
        found = [_row(root, attention, data, scores[attention], options) for attention in study.attention]
        _compare(found, scores, study.reference, margin, options)
        rows += found
    return rows


def read_scores(root: Path, attention: str, data: str, seeds: int) -> Float[Array, "s e"] | None:
    """Scores of a cell, one row a seed and one column a test example; None where the cell is not applicable."""
    if read_cell(root, attention, data)["status"] != "ok":
        return None
    per_seed = [np.load(seed_file(root, attention, data, k, "scores.npy"), allow_pickle=False) for k in range(seeds)]
    sizes = sorted({scores.shape for scores in per_seed})
    if len(sizes) > 1 or len(sizes[0]) != 1 or not all(np.isfinite(scores).all() for scores in per_seed):
        raise ValueError(
            f"`models/{attention}/{data}` has scores of shapes {sizes} that are unequal, empty or not finite: "
            f"run `dvc repro -f train@{data}-{attention}`"
        )
    return np.stack(per_seed).astype(np.float64)


def _row(root: Path, attention: str, data: str, scores: Float[Array, "s e"] | None, options: dict[str, Any]) -> Row:
    row: Row = {"data": data, "attention": attention, "baselines": _baselines(root, data)}
    if scores is None:
        empty = dict.fromkeys(("metric", "higher_is_better", "mean", "low", "high", "verdict"))
        refusal = {"status": "not_applicable", "reason": read_cell(root, attention, data)["reason"]}
        return row | empty | refusal | {"seeds": [], "values": [], "versus": {}, "num_examples": 0}
    metrics = [_metrics(root, attention, data, seed, float(each.mean())) for seed, each in enumerate(scores)]
    found = interval(scores, **options)
    low, high = _clip(metrics[0]["metric"], found)
    return row | {
        "status": "ok",
        "reason": None,
        "metric": metrics[0]["metric"],
        "higher_is_better": metrics[0]["higher_is_better"],
        "mean": found.mean,
        "low": low,
        "high": high,
        "seeds": list(range(len(scores))),
        "values": [entry["value"] for entry in metrics],
        "num_examples": scores.shape[1],
        "versus": {},
    }


def _compare(rows: list[Row], scores: dict[str, Any], reference: str, margin: float, options: dict[str, Any]) -> None:
    """Fill `versus` and `verdict`: every method against the reference on the same test examples."""
    baseline = scores[reference]
    others = [row for row in rows if row["status"] == "ok" and row["attention"] != reference]
    for row in rows:
        if row["attention"] == reference and row["status"] == "ok":
            row["verdict"] = "reference"
    if baseline is None:
        return
    found = [interval(scores[row["attention"]], baseline, **options) for row in others]
    adjusted = holm([difference.p_value for difference in found])
    for row, difference, p_adjusted in zip(others, found, adjusted, strict=True):
        row["verdict"] = verdict(
            difference,
            p_adjusted,
            seeds=min(len(baseline), len(row["seeds"])),
            higher_is_better=row["higher_is_better"],
            margin=margin,
            level=1 - options["confidence"],
        )
        row["versus"][reference] = {
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "p_value": difference.p_value,
            "p_adjusted": p_adjusted,
            "verdict": row["verdict"],
        }


def _clip(metric: str, found: Interval) -> tuple[float, float]:
    """The interval inside what the metric can be."""
    lowest, highest = BOUNDS[metric]
    return max(found.low, lowest), min(found.high, highest)


def _metrics(root: Path, attention: str, data: str, seed: int, mean: float) -> Row:
    metrics = read_json(seed_file(root, attention, data, seed, "metrics.json"))
    assert isinstance(metrics, dict), "metrics.json holds an object"
    if metrics["metric"] not in BOUNDS or abs(metrics["value"] - mean) > AGREEMENT:
        raise ValueError(
            f"`models/{attention}/{data}/seed{seed}/metrics.json` says {metrics['metric']} = {metrics['value']}, its "
            f"scores.npy {mean} (known metrics: {list(BOUNDS)}): run `dvc repro -f train@{data}-{attention}`"
        )
    return metrics


def _baselines(root: Path, data: str) -> dict[str, float]:
    """Test metrics of the simple predictors that stand beside the models."""
    path = root / "data" / "prepared" / data / "meta.json"
    if not path.is_file():
        raise ValueError(f"`data/prepared/{data}/meta.json` is missing: run `dvc repro prepare@{data}`")
    meta = read_json(path)
    assert isinstance(meta, dict), "meta.json holds an object"
    return meta.get("baselines") or {}
