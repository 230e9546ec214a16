"""A whole study, small: what `dvc repro` runs, runs again, and leaves alone."""

import re
from pathlib import Path

import pytest

from tests.copies import copy_project, run

SMALL = {
    "params.yaml": [
        (r"source: .*", "source: []"),
        (r"data: .*", "data: [mqar]"),
        (r"attention:\n(  - \w+\n)+", "attention: [softmax, mean, random_keys]\n"),
        (r"seeds: .*", "seeds: 1"),
        (r"budgets: .*", "budgets: [0.5]"),
        (r"subject: .*", "subject: [mqar]"),
        (r"substitution: .*", "substitution: [mean]"),
    ],
    "conf/data/mqar.yaml": [(r"num_train: .*", "num_train: 64"), (r"num_(validation|test): .*", r"num_\1: 8")],
    "conf/experiment/mqar.yaml": [(r"steps: 300", "steps: 2"), (r"warmup_steps: .*", "warmup_steps: 1")],
    "conf/analysis/default.yaml": [(r"draws: .*", "draws: 2"), (r"resamples: .*", "resamples: 100")],
    "conf/analysis/converge.yaml": [(r"draws: .*", "draws: 2")],
    "conf/substitute.yaml": [(r"steps: .*", "steps: 2")],
    "conf/common.yaml": [(r"logger: wandb", "logger: csv")],
}


@pytest.fixture
def project(tmp_path):
    copy_project(tmp_path)
    for path, changes in SMALL.items():
        text = (tmp_path / path).read_text()
        for pattern, replacement in changes:
            text, count = re.subn(pattern, replacement, text)
            assert count, f"{path} has no {pattern}: the small study would be a large one"
        (tmp_path / path).write_text(text)
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / ".gitignore").write_text("/data/\n/models/\n/outputs/\n/results/\n/report/\n__pycache__/\n")
    return tmp_path


def repro(project: Path, *flags: str) -> set[str]:
    """The stages that `dvc repro` ran, or would run."""
    return set(re.findall(r"Running stage '([^']+)'", run(project, "dvc", "repro", *flags)))


@pytest.mark.slow
def test_a_study_from_nothing_then_only_what_changed(project):
    methods = ("softmax", "mean", "random_keys")
    everything = {"prepare@mqar", "accuracy", "variance", "cache", "report"}
    everything |= {"substitute@mqar-mean"} | {f"train@mqar-{name}" for name in methods}
    everything |= {f"{stage}@{name}" for stage in ("approximate", "converge") for name in methods}
    assert repro(project) == everything
    assert (project / "report" / "index.html").stat().st_size > 100_000
    assert (project / "results" / "table.parquet").is_file()
    lock = (project / "dvc.lock").read_bytes()
    assert repro(project) == set(), "nothing changed, yet something ran"

    conf = project / "conf" / "attention" / "random_keys.yaml"
    text = conf.read_text()
    conf.write_text(text + "# a comment\n")
    assert repro(project, "--dry") == set(), "a comment is no change"
    conf.write_text(text.replace("num_keys: 16", "num_keys: 9"))
    assert repro(project) == {
        *("train@mqar-random_keys", "approximate@random_keys", "converge@random_keys"),
        *("accuracy", "report"),
    }

    conf.write_text(text)
    repro(project, "-f", "--no-run-cache")
    assert (project / "dvc.lock").read_bytes() == lock, "a forced second run gave other results"
