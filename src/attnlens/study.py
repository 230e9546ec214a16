"""The axes of a study, as params.yaml lists them, and where the cells they span stand on disk."""

from pathlib import Path
from typing import NamedTuple

from attnlens.files import read_json

AXES = ("source", "data", "attention", "subject", "substitution", "pretrained")


class Study(NamedTuple):
    """The axes.

    source: packages that data is fetched from; may be empty.
    data, attention: names of files under conf/.
    projection: the one that every method is trained under.
    seeds: how many; they are 0 .. seeds - 1.
    budgets: fractions of exact attention's FLOPs.
    reference: the method whose models lend their Q, K, V to every other.
    subject: trained models in which exact attention is replaced; may be empty.
    substitution: the methods that replace it; may be empty.
    pretrained: models of others that are converted; may be empty.
    """

    source: tuple[str, ...]
    data: tuple[str, ...]
    attention: tuple[str, ...]
    projection: str
    seeds: int
    budgets: tuple[float, ...]
    reference: str
    subject: tuple[str, ...] = ()
    substitution: tuple[str, ...] = ()
    pretrained: tuple[str, ...] = ()


def read_params(path: Path | str) -> Study:
    """The study that `path` (params.yaml) describes.

    Raises:
        ValueError: an axis is missing, unknown, empty, or holds a value that it cannot hold.
    """
    import yaml

    params = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(params, dict):
        raise ValueError(f"`{path}` must map axes to values, got {type(params).__name__}: list {list(Study._fields)}")
    unknown, missing = sorted(set(params) - set(Study._fields)), sorted(set(Study._fields) - set(params))
    if unknown or missing:
        raise ValueError(f"`{path}` has unknown axes {unknown} and lacks {missing}; valid: {list(Study._fields)}")
    names = {axis: _names(axis, params[axis]) for axis in AXES}
    seeds, reference = params["seeds"], params["reference"]
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"`seeds` must be a number of seeds, at least 1, got {seeds!r}")
    if not isinstance(params["projection"], str):
        raise ValueError(f"`projection` must be one name, got {params['projection']!r}")
    if reference not in params["attention"]:
        raise ValueError(f"`reference` must be one of `attention` {params['attention']}, got {reference!r}")
    return Study(
        **names,
        projection=params["projection"],
        seeds=seeds,
        budgets=_budgets(params["budgets"]),
        reference=reference,
    )


def _names(axis: str, names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`{axis}` must be a list of names, got {names!r}")
    if not names and axis in ("data", "attention"):
        raise ValueError(f"`{axis}` must be a list of at least one name, got {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"`{axis}` names a value twice: {names}")
    return tuple(names)


def _budgets(budgets: object) -> tuple[float, ...]:
    numbers = budgets if isinstance(budgets, list) else []
    if not numbers or not all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in numbers):
        raise ValueError(f"`budgets` must be a list of positive fractions of exact attention's FLOPs, got {budgets!r}")
    return tuple(float(x) for x in numbers)


def read_cell(root: Path, attention: str, data: str) -> dict:
    """cell.json of the model that was trained with `attention` on `data`.

    Raises:
        ValueError: it has not been trained, or its record is not whole; the message names the command.
    """
    stage = f"train@{data}-{attention}"
    path = root / "models" / attention / data / "cell.json"
    if not path.is_file():
        raise ValueError(f"`models/{attention}/{data}` has not been trained: run `dvc repro {stage}`")
    cell = read_json(path)
    if not isinstance(cell, dict) or cell.get("status") not in ("ok", "not_applicable"):
        raise ValueError(f"`models/{attention}/{data}/cell.json` is no record of a cell: run `dvc repro -f {stage}`")
    return cell


def seed_file(root: Path, attention: str, data: str, seed: int, name: str) -> Path:
    """The file `name` of one seed of a trained cell.

    Raises:
        ValueError: it is not there; the message names the command that makes it.
    """
    path = root / "models" / attention / data / f"seed{seed}" / name
    if not path.is_file():
        raise ValueError(
            f"`models/{attention}/{data}/seed{seed}/{name}` is missing: run `dvc repro -f train@{data}-{attention}`"
        )
    return path
