"""The sentences follow the numbers."""

import json

import pytest
from scipy.stats import spearmanr

from attnlens.report.cells import read_cells
from attnlens.report.table import join
from attnlens.report.verdicts import findings, share, spearman, words


def test_spearman_agrees_with_scipy_and_knows_ties():
    x, y = [1.0, 2.0, 2.0, 5.0, 4.0, 0.5], [3.0, 1.0, 4.0, 6.0, 6.0, 2.0]
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert spearman(x, x) == pytest.approx(1.0)
    assert spearman(x, [1.0] * 6) is None


@pytest.mark.parametrize(
    ("budget", "text"), [(0.25, "1/4"), (0.0625, "1/16"), (0.3, "3/10"), (1.0, "1"), (0.123456, "0.123")]
)
def test_budgets_read_as_fractions(budget, text):
    assert share(budget) == text


def test_words():
    assert words(["a"]) == "a"
    assert words(["a", "b", "c"]) == "a, b and c"


def by_heading(cells, rows):
    return {finding.heading: finding.text for finding in findings(cells, rows)}


def test_the_best_methods_and_the_best_null_are_named(cells, rows):
    found = by_heading(cells, rows)
    text = found["mqar: test score"]
    assert text.index("softmax (1.0") < text.index("hyperattention (0.9") < text.index("best null is random_keys")
    assert "trigram 3.020" in found["shakespeare: test score"]


def test_comparisons_with_the_reference_are_grouped_by_verdict(study):
    path = study / "results/accuracy.json"
    value = json.loads(path.read_text())
    for row in value["rows"]:
        if row["verdict"] and row["attention"] in ("window", "linear"):
            row["verdict"] = "worse"
    path.write_text(json.dumps(value))
    cells = read_cells(study)
    text = by_heading(cells, join(cells))["mqar: test score"]
    assert "worse: window and linear" in text
    assert "too few seeds: mean, identity" in text


def test_a_method_behind_the_best_null_is_named(study):
    path = study / "results/accuracy.json"
    value = json.loads(path.read_text())
    for row in value["rows"]:
        if (row["attention"], row["data"]) == ("window", "mqar"):
            row["mean"] = 0.2
    path.write_text(json.dumps(value))
    cells = read_cells(study)
    assert "window does not beat it" in by_heading(cells, join(cells))["mqar: test score"]


def test_skill_of_one_or_more_is_no_information(cells, rows):
    text = by_heading(cells, rows)["Skill of 1 or more at 1/4"]
    assert "linear on mqar" in text
    assert "no information beyond mean(V)" in text
    assert "window" not in text


def test_only_methods_at_the_budget_are_ranked_by_error(cells, rows):
    text = by_heading(cells, rows)["mqar: error at 1/4 of exact attention's FLOPs"]
    assert "nystromformer (0.244)" in text
    assert "linear" not in text
    assert "softmax" not in text


def test_exclusions_are_said_with_their_reason(cells, rows):
    found = by_heading(cells, rows)
    assert "smyrf on shakespeare: smyrf is not causal" in found["Not applicable"]
    assert "performer at 1/16" in found["Unreachable budgets"]
    assert "2 a cell" in found["Too few seeds"]
    assert "Strays" not in found


def test_strays_are_named(study):
    (study / "results/approximate/gone.json").write_text("{}")
    cells = read_cells(study)
    assert "results/approximate/gone.json" in by_heading(cells, join(cells))["Strays"]
