"""What a study left on disk, listed from params.yaml: a missing cell is an error, a stray is named."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from attnlens.files import read_json
from attnlens.study import Study, read_params


@dataclass(frozen=True)
class Cells:
    """The results of a study, every one present and of the listed axes."""

    axes: Study
    study: str
    accuracy: dict[tuple[str, str], dict]
    approximate: dict[str, dict]
    converge: dict[str, dict]
    variance: dict
    trained: dict[tuple[str, str], dict]
    metrics: dict[tuple[str, str, int], dict]
    meta: dict[str, dict]
    configs: dict[str, str]
    strays: tuple[str, ...]
    cache: dict
    substitute: dict[tuple[str, str], dict]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.axes.seeds))

    @property
    def headline(self) -> float:
        """The budget whose errors stand for a method in one number: 1/4, or else the middle of the ladder."""
        budgets = sorted(self.axes.budgets)
        return 0.25 if 0.25 in budgets else budgets[len(budgets) // 2]


def read_cells(root: Path) -> Cells:
    """Everything the report joins, from the folders under `root`.

    Raises:
        ValueError: a cell of params.yaml has no result; the message names every one and the command that makes it.
    """
    axes = read_params(root / "params.yaml")
    pairs = [(attention, data) for attention in axes.attention for data in axes.data]
    missing: list[tuple[str, str]] = []
    accuracy = _read(root, "results/accuracy.json", "accuracy", missing)
    approximate = {a: _read(root, f"results/approximate/{a}.json", f"approximate@{a}", missing) for a in axes.attention}
    converge = {a: _read(root, f"results/converge/{a}.json", f"converge@{a}", missing) for a in axes.attention}
    variance = _read(root, "results/variance.json", "variance", missing)
    cache = _read(root, "results/cache.json", "cache", missing)
    substitute = {
        (s, a): _read(root, f"results/substitute/{s}/{a}.json", f"substitute@{s}-{a}", missing)
        for s in axes.subject
        for a in axes.substitution
    }
    meta = {data: _read(root, f"data/prepared/{data}/meta.json", f"prepare@{data}", missing) for data in axes.data}
    trained = {
        (a, data): _read(root, f"models/{a}/{data}/cell.json", train_stage(a, data), missing) for a, data in pairs
    }
    metrics = {
        (a, data, seed): _read(root, f"models/{a}/{data}/seed{seed}/metrics.json", train_stage(a, data), missing)
        for a, data in pairs
        if trained[a, data].get("status") == "ok"
        for seed in range(axes.seeds)
    }
    _refuse(missing)
    scored = {(row["data"], row["attention"]): row for row in accuracy["rows"]}
    _refuse([(f"results/accuracy.json ({a} on {d})", "accuracy") for a, d in pairs if (d, a) not in scored])
    configs = {data: _config(root, axes.reference, data) for data in axes.data}
    strays = tuple(_strays(root, axes, scored))
    study = str(accuracy.get("study") or "default")
    return Cells(
        axes, study, scored, approximate, converge, variance, trained, metrics, meta, configs, strays, cache, substitute
    )


def train_stage(attention: str, data: str) -> str:
    """DVC's name of the cell that trains `attention` on `data` (the order of the matrix in dvc.yaml)."""
    return f"train@{data}-{attention}"


def _read(root: Path, name: str, stage: str, missing: list[tuple[str, str]]) -> dict:
    path = root / name
    if not path.is_file():
        missing.append((name, stage))
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must hold a JSON object, got {type(value).__name__}: run `dvc repro -f {stage}`")
    return value


def _refuse(missing: Iterable[tuple[str, str]]) -> None:
    lines = [f"  {name}: run `dvc repro {stage}`" for name, stage in missing]
    if lines:
        raise ValueError("params.yaml lists cells that have no result:\n" + "\n".join(lines))


def _config(root: Path, attention: str, data: str) -> str:
    path = root / "models" / attention / data / "seed0" / "config.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _strays(root: Path, axes: Study, scored: Iterable[tuple[str, str]]) -> list[str]:
    """Results that belong to no listed cell: left by a method, a data set or a seed since removed."""
    stages = ("approximate", "converge")
    named = [f"results/{stage}/{p.name}" for stage in stages for p in (root / "results" / stage).glob("*.json")]
    strays = [name for name in named if Path(name).stem not in axes.attention]
    for path in (root / "results/substitute").glob("*/*.json"):
        if path.parent.name not in axes.subject or path.stem not in axes.substitution:
            strays.append(f"results/substitute/{path.parent.name}/{path.name}")
    for folder in (root / "models").glob("*/*"):
        attention, data = folder.parts[-2:]
        if attention not in axes.attention or data not in axes.data:
            strays.append(f"models/{attention}/{data}")
            continue
        known = {f"seed{seed}" for seed in range(axes.seeds)}
        strays += [f"models/{attention}/{data}/{p.name}" for p in folder.glob("seed*") if p.name not in known]
    strays += [
        f"results/accuracy.json ({attention} on {data})"
        for data, attention in scored
        if attention not in axes.attention or data not in axes.data
    ]
    return sorted(strays)
