"""CONTRIBUTING's recipe, followed to the letter in a copy of the project."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from attnlens.files import read_json
from tests.copies import copy_project, run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(path: str) -> str:
    """The code that the recipe gives for a file, without its indentation."""
    found = re.search(rf"`{re.escape(path)}`.*?```\w+\n(.*?)\n   ```", TEXT, re.DOTALL)
    assert found, f"CONTRIBUTING.md gives no text for {path}"
    return re.sub(r"^   ", "", found.group(1), flags=re.MULTILINE) + "\n"


@pytest.fixture
def project(tmp_path):
    copy_project(tmp_path, "tests")
    for path in ("src/attnlens/attention/toy.py", "conf/attention/toy.yaml"):
        (tmp_path / path).write_text(block(path))
    params = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(params.replace("\n  - softmax\n", "\n  - softmax\n  - toy\n"))
    return tmp_path


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
    stages = run(project, "dvc", "stage", "list", "--name-only").split()
    assert {"train@mqar-toy", "train@shakespeare-toy", "approximate@toy"} <= set(stages)
    few = ("data.num_train=64", "data.num_validation=8", "data.num_test=8")
    run(project, sys.executable, "pipelines/prepare.py", "data=mqar", *few)
    short = ("training.steps=2", "training.warmup_steps=1", "logger=csv", "out=models/toy/mqar")
    run(project, sys.executable, "pipelines/train.py", "experiment=mqar", "attention=toy", *short)
    assert read_json(project / "models" / "toy" / "mqar" / "cell.json")["status"] == "ok"
