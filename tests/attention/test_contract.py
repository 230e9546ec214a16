"""Every file of conf/attention/ against every row of the contract: a new method is tested by existing."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.testing import CONTRACT

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf" / "attention"
METHODS = sorted(path.stem for path in CONF.glob("*.yaml"))
PARTS = 6  # processes in which the methods are compiled
COMPILE = """
import json, sys
from functools import partial
from omegaconf import OmegaConf
from attnlens.attention import build
from attnlens.testing import CONTRACT
found = {}
for path in sys.argv[1:]:
    try:
        found[path] = CONTRACT["compilation"](partial(build, OmegaConf.load(path))) or "passed"
    except AssertionError as error:
        found[path] = f"failed: {error}"
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_compilation(part):
    """The compiler cannot trace through the shape checks of the test run: this row runs in a process without them."""
    paths = [str(CONF / f"{method}.yaml") for method in METHODS[part::PARTS]]
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(paths)
    failed = {Path(path).stem: result for path, result in found.items() if result.startswith("failed")}
    assert not failed


@pytest.mark.parametrize("row", [row for row in CONTRACT if row != "compilation"])
@pytest.mark.parametrize("method", METHODS)
def test_contract(method, row):
    factory = partial(build, OmegaConf.load(CONF / f"{method}.yaml"))
    reason = CONTRACT[row](factory)
    assert reason is None or reason
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("method", METHODS)
def test_one_name_everywhere(method):
    """The module is called as the yaml, and the yaml's first line is the command that runs it."""
    text = (CONF / f"{method}.yaml").read_text()
    assert text.splitlines()[0] == f"# python pipelines/train.py experiment=mqar attention={method}"
    assert OmegaConf.load(CONF / f"{method}.yaml")._target_.startswith(f"attnlens.attention.{method}.")
