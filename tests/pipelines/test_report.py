"""pipelines/report.py from a folder of results to the report, the console and a W&B-free log."""

import csv
import subprocess
import sys
from pathlib import Path

from tests.report.synthetic import METHODS, write_study

SCRIPT = Path(__file__).parents[2] / "pipelines/report.py"


def run(folder, *overrides):
    command = [sys.executable, str(SCRIPT), "logger=csv", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_script_writes_the_report_logs_it_and_ends_with_its_path(tmp_path):
    write_study(tmp_path)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "report/index.html"
    assert max(map(len, lines)) <= 100
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in METHODS)
    for path in ("report/index.html", "results/table.parquet", "results/summary.json", "results/figures/error.png"):
        assert (tmp_path / path).stat().st_size > 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["index.html"]
    with (tmp_path / "outputs/report/tables/table.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 98
    assert (tmp_path / "outputs/report/figures/accuracy.png").exists()


def test_a_missing_cell_fails_the_stage_and_writes_nothing(tmp_path):
    write_study(tmp_path)
    (tmp_path / "results/approximate/performer.json").unlink()
    done = run(tmp_path)
    assert done.returncode != 0
    assert "results/approximate/performer.json: run `dvc repro approximate@performer`" in done.stderr
    assert not (tmp_path / "report").exists()
    assert not (tmp_path / "results/table.parquet").exists()
