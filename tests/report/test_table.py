"""The joined table: every listed cell is a row, numbers are those of the files, and equal inputs give equal bytes."""

import json
import math
import subprocess
import sys

import pyarrow.parquet
import pytest

from attnlens.report.cells import read_cells
from attnlens.report.columns import COLUMNS
from attnlens.report.table import headline_rows, join, summarize, write_table
from tests.report.synthetic import BUDGETS, DATA, METHODS, SEEDS, runs


def pick(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_one_row_a_method_budget_task_and_seed(rows):
    for attention, (_, _, argument, *_) in METHODS.items():
        for data in DATA:
            found = [(row["budget"], row["seed"]) for row in pick(rows, method=attention, task=data)]
            ladder = BUDGETS if argument else (None,)
            assert found == ([(b, s) for b in ladder for s in SEEDS] if runs(attention, data) else [(None, None)])


def test_names_are_unique_and_rows_hold_every_column(rows):
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names)
    assert all(list(row) == names for row in rows)


def test_a_cell_that_mathematics_rules_out_is_a_row_with_its_reason(rows):
    (row,) = pick(rows, method="smyrf", task="shakespeare")
    assert row["status"] == "not applicable"
    assert "not causal" in row["reason"]
    assert row["score"] is None
    assert row["own_error"] is None


def test_an_unreachable_budget_keeps_its_numbers_and_says_so(rows):
    found = pick(rows, method="performer", budget=BUDGETS[0])
    assert {row["status"] for row in found} == {"unreachable"}
    assert all(row["reason"] and row["own_error"] is not None for row in found)
    assert {row["status"] for row in pick(rows, method="performer", budget=BUDGETS[1])} == {"ok"}


def test_errors_are_means_over_layers_and_heads_of_one_source_and_seed(root, rows):
    entries = json.loads((root / "results/approximate/window.json").read_text())["rows"]
    for source in ("own", "reference"):
        part = pick(entries, data="mqar", source=source, seed=1, budget=0.25)
        assert len(part) == 4
        (row,) = pick(rows, method="window", task="mqar", seed=1, budget=0.25)
        errors = [entry["error"] for entry in part]
        assert math.isclose(row[f"{source}_error"], sum(errors) / 4, rel_tol=1e-14)
        assert row[f"{source}_error_min"] == min(errors)
        assert row[f"{source}_error_max"] == max(errors)
        assert row[f"{source}_row_sum_defect"] == max(entry["row_sum_defect"] for entry in part)


def test_scores_come_with_their_paired_difference_to_the_reference(rows):
    row = pick(rows, method="window", task="mqar")[0]
    reference = pick(rows, method="softmax", task="mqar")[0]
    assert math.isclose(row["difference"], row["score_mean"] - reference["score_mean"])
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert row["p_value"] == 0.04
    assert reference["difference"] is None


def test_a_score_that_accuracy_has_not_seen_is_refused(study):
    """Metrics trained anew beside an old accuracy.json once joined into rows whose interval missed their value."""
    path = study / "models/window/mqar/seed0/metrics.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"value": value["value"] + 1e-3}))
    with pytest.raises(ValueError, match=r"models/window/mqar/seed0.*`dvc repro accuracy`"):
        join(read_cells(study))


@pytest.mark.parametrize(("axis", "value"), [("seed", 1), ("source", "own"), ("budget", 0.5), ("data", "mqar")])
def test_a_missing_measurement_is_refused(study, axis, value):
    path = study / "results/approximate/window.json"
    cell = json.loads(path.read_text())
    cell["rows"] = [row for row in cell["rows"] if row[axis] != value]
    path.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match=r"window\.json.*approximate@window"):
        join(read_cells(study))


def test_rows_do_not_depend_on_the_order_in_the_files(study, rows):
    path = study / "results/approximate/window.json"
    cell = json.loads(path.read_text())
    cell["rows"].reverse()
    path.write_text(json.dumps(cell))
    assert join(read_cells(study)) == rows


def test_parquet_reads_back_with_its_types(root, rows):
    table = pyarrow.parquet.read_table(root / "results/table.parquet")
    assert table.to_pylist() == rows
    assert table.schema.metadata is None
    assert str(table.schema.field("seed").type) == "int64"
    assert str(table.schema.field("reachable").type) == "bool"


def test_parquet_has_equal_bytes_in_another_process(root, tmp_path):
    write_table(tmp_path / "here.parquet", join(read_cells(root)))
    code = (
        "import sys; from pathlib import Path; from attnlens.report.cells import read_cells;"
        "from attnlens.report.table import join, write_table;"
        "write_table(Path(sys.argv[2]), join(read_cells(Path(sys.argv[1]))))"
    )
    subprocess.run([sys.executable, "-c", code, str(root), str(tmp_path / "there.parquet")], check=True)
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "there.parquet").read_bytes()


def test_headline_rows_are_of_one_budget_or_of_none(rows):
    assert {row["budget"] for row in headline_rows(rows, 0.25)} == {0.25, None}


def test_summary_holds_the_headline_of_every_cell(root, cells, rows):
    summary = json.loads((root / "results/summary.json").read_text())
    assert summary == {"budget": 0.25, "data": summarize(cells, rows)}
    assert set(summary["data"]["mqar"]) == set(METHODS)
    assert summary["data"]["shakespeare"]["smyrf"] == {"status": "not applicable"}
    part = pick(rows, method="window", task="mqar", budget=0.25)
    entry = summary["data"]["mqar"]["window"]
    assert entry["accuracy"] == part[0]["score_mean"]
    assert math.isclose(entry["error_own"], sum(row["own_error"] for row in part) / 2)
