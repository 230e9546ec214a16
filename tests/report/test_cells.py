"""Cells are listed from params.yaml: what is missing is an error with its remedy, what is too much is named."""

import json
import shutil

import pytest

from attnlens.report.cells import read_cells, train_stage


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("results/approximate/performer.json", "dvc repro approximate@performer"),
        ("results/converge/performer.json", "dvc repro converge@performer"),
        ("results/variance.json", "dvc repro variance"),
        ("results/cache.json", "dvc repro cache"),
        ("results/substitute/shakespeare/window.json", "dvc repro substitute@shakespeare-window"),
        ("results/accuracy.json", "dvc repro accuracy"),
        ("models/window/mqar/cell.json", "dvc repro train@mqar-window"),
        ("models/window/mqar/seed1/metrics.json", "dvc repro train@mqar-window"),
        ("data/prepared/mqar/meta.json", "dvc repro prepare@mqar"),
    ],
)
def test_a_missing_result_is_named_with_its_command(study, path, command):
    (study / path).unlink()
    with pytest.raises(ValueError) as error:
        read_cells(study)
    assert path in str(error.value)
    assert f"`{command}`" in str(error.value)


def test_every_missing_result_is_named_at_once(study):
    shutil.rmtree(study / "results/approximate")
    with pytest.raises(ValueError) as error:
        read_cells(study)
    assert str(error.value).count("results/approximate/") == 10


def test_a_cell_missing_from_accuracy_is_named(study):
    path = study / "results/accuracy.json"
    value = json.loads(path.read_text())
    value["rows"] = [row for row in value["rows"] if (row["attention"], row["data"]) != ("linear", "mqar")]
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"linear on mqar.*dvc repro accuracy"):
        read_cells(study)


def test_a_result_cut_short_is_refused(study):
    path = study / "results/approximate/smyrf.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"smyrf\.json.*not valid JSON"):
        read_cells(study)


def test_no_strays_in_a_clean_study(cells):
    assert cells.strays == ()


def test_strays_are_named_and_stay_out(study):
    params = study / "params.yaml"
    params.write_text(params.read_text().replace(", linear]", "]"))
    (study / "models/window/mqar/seed2").mkdir()
    cells = read_cells(study)
    assert set(cells.strays) == {
        "results/approximate/linear.json",
        "results/converge/linear.json",
        "models/linear/mqar",
        "models/linear/shakespeare",
        "models/window/mqar/seed2",
        "results/accuracy.json (linear on mqar)",
        "results/accuracy.json (linear on shakespeare)",
    }
    assert "linear" not in cells.approximate


def test_the_headline_budget_is_a_quarter_or_the_middle_of_the_ladder(study):
    assert read_cells(study).headline == 0.25
    params = study / "params.yaml"
    params.write_text(params.read_text().replace("0.25, ", ""))
    assert read_cells(study).headline == 0.125


def test_stage_names_are_those_of_dvc():
    """A matrix names its cells by its axes in order; a remedy that names no stage is none."""
    from pathlib import Path

    import yaml

    path = Path(__file__).parents[2] / "dvc.yaml"
    matrix = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]["train"]["matrix"]
    values = {"attention": "smyrf", "data": "mqar"}
    assert train_stage("smyrf", "mqar") == "train@" + "-".join(values[axis] for axis in matrix)
