"""Every row of the contract passes healthy operators and fails the one made to break it."""

import subprocess
import sys
from pathlib import Path

import pytest

from attnlens.testing import CONTRACT
from tests.testing.broken import BROKEN, HEALTHY

# The compiler cannot trace through the shape checks of the test run: its row runs in a process without them.
HERE = [row for row in CONTRACT if row != "compilation"]
ELSEWHERE = """
from attnlens.testing import CONTRACT, check_attention
from tests.testing.broken import BROKEN, HEALTHY, Dense
report = check_attention(Dense)
assert set(report) == set(CONTRACT)
assert report["exact_limit"] == report["compilation"] == "passed", report
assert report["order"] == "no order declared", report
for operator in HEALTHY[1:]:
    CONTRACT["compilation"](operator)
for operator in BROKEN["compilation"]:
    try:
        CONTRACT["compilation"](operator)
    except AssertionError as error:
        assert "does not compile as one graph" in str(error)
    else:
        raise SystemExit("the broken operator passed")
"""


def test_every_row_has_an_operator_that_breaks_it():
    assert set(BROKEN) == set(CONTRACT)


@pytest.mark.parametrize("operator", HEALTHY)
@pytest.mark.parametrize("row", HERE)
def test_healthy_operators_pass(row, operator):
    reason = CONTRACT[row](operator)
    assert reason is None or isinstance(reason, str)


@pytest.mark.parametrize(("row", "operator"), [(row, op) for row in HERE for op in BROKEN[row]])
def test_the_row_fails_its_broken_operator(row, operator):
    with pytest.raises(AssertionError):
        CONTRACT[row](operator)


def test_compilation_and_the_whole_suite():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
