"""CONTRIBUTING's recipe, followed to the letter in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attnlens.files import read_json

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PARTS = ("conf", "pipelines", "src", "tests", "params.yaml", "dvc.yaml", "pyproject.toml", ".dvc/config")


def block(path: str) -> str:
    """The code that the recipe gives for a file, without its indentation."""
    found = re.search(rf"`{re.escape(path)}`.*?```\w+\n(.*?)\n   ```", TEXT, re.DOTALL)
    assert found, f"CONTRIBUTING.md gives no text for {path}"
    return re.sub(r"^   ", "", found.group(1), flags=re.MULTILINE) + "\n"


@pytest.fixture
def project(tmp_path):
    for part in PARTS:
        source, target = ROOT / part, tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    for path in ("src/attnlens/attention/toy.py", "conf/attention/toy.yaml"):
        (tmp_path / path).write_text(block(path))
    params = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(params.replace("\n  - softmax\n", "\n  - softmax\n  - toy\n"))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def run(project: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(project / "src"), "OMP_NUM_THREADS": "1"}
    # The suite's own workers must not be taken for those of this inner run.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_fits_a_screen_and_ends_with_the_recipe():
    assert len(TEXT.splitlines()) <= 80
    assert TEXT.rfind("\n## ") == TEXT.index("\n## To add a method")


@pytest.mark.slow
def test_the_recipe_works(project):
    assert "toy" in yaml.safe_load((project / "params.yaml").read_text())["attention"]
    suite = ("tests/attention/test_contract.py", "-k", "toy and not compilation")
    out = run(project, sys.executable, "-m", "pytest", *suite)
    assert "passed" in out
    assert "failed" not in out
    dvc = Path(sys.executable).with_name("dvc")
    stages = run(project, str(dvc), "stage", "list", "--name-only").split()
    assert {"train@mqar-toy", "train@shakespeare-toy", "approximate@toy"} <= set(stages)
    few = ("data.num_train=64", "data.num_validation=8", "data.num_test=8")
    run(project, sys.executable, "pipelines/prepare.py", "data=mqar", *few)
    short = ("training.steps=2", "training.warmup_steps=1", "logger=csv", "out=models/toy/mqar")
    run(project, sys.executable, "pipelines/train.py", "experiment=mqar", "attention=toy", *short)
    assert read_json(project / "models" / "toy" / "mqar" / "cell.json")["status"] == "ok"
