"""The project copied into a folder of its own, and commands run in that copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("conf", "pipelines", "src", "params.yaml", "dvc.yaml", "pyproject.toml", ".dvc/config", ".dvcignore")


def copy_project(target: Path, *more: str) -> Path:
    """Everything that the pipeline needs, and `more`, as a git repository."""
    for part in (*PARTS, *more):
        source, place = ROOT / part, target / part
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)
    return target


def run(project: Path, *command: str) -> str:
    """What a command prints in the copy, with this environment's programs and the copy's package."""
    scripts = Path(sys.executable).parent
    # The suite's own workers must not be taken for those of an inner run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PATH": f"{scripts}{os.pathsep}{environment['PATH']}",
        "PYTHONPATH": str(project / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
