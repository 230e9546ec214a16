"""README's tables are those that its generator makes from what is committed."""

from pathlib import Path

import pytest

from attnlens.report.readme import blocks, fill, study_table

ROOT = Path(__file__).parents[2]


def test_readme_holds_the_generated_tables():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fill(text, blocks(ROOT)) == text, "run `python -m attnlens.report.readme`"


def test_a_cell_that_does_not_apply_is_a_dash():
    summary = {
        "a": {"x": {"accuracy": 0.5, "error_reference": 0.25}, "y": {"status": "not applicable"}},
        "b": {"x": {"bits_per_character": 2.0, "error_reference": None}, "y": {"bits_per_character": 3.0}},
    }
    lines = study_table(summary, ["x", "y"]).splitlines()
    assert lines[0] == "| method | `a` accuracy | error | `b` bits/char | error |"
    assert lines[2:] == ["| `x` | 0.50 | 0.25 | 2.00 | – |", "| `y` | – | – | 3.00 | – |"]


def test_a_text_without_the_place_is_refused():
    with pytest.raises(ValueError, match="<!-- study -->"):
        fill("nothing", {"study": "x"})
