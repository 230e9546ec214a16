"""The table at the end of a run."""

from attnlens.report.cells import read_cells
from attnlens.report.console import console
from attnlens.report.table import join
from tests.report.synthetic import METHODS


def test_every_method_has_its_line_within_100_columns(cells, rows):
    lines = console(cells, rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert {name for name in METHODS if any(line.startswith(f"{name} ") for line in lines)} == set(METHODS)
    (smyrf,) = [line for line in lines if line.startswith("smyrf")]
    assert smyrf.split()[1:] == ["0.875", "0.383", "–", "–"]


def test_strays_are_named(study):
    (study / "results/approximate/gone.json").write_text("{}")
    cells = read_cells(study)
    assert "stray, in no number: results/approximate/gone.json" in console(cells, join(cells))
