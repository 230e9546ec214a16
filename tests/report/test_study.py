"""The study as Markdown: every method on every budget, and a reason where there is none."""

import pandas

from attnlens.report.study import latest, orders_table, task_table, write_figures

from .synthetic import METHODS, converged, varied


def rows(method, budgets, **values):
    found = {"family": "sparse", "method": method, "task": "recall", "reason": None, "score": 0.5}
    found |= {"score_mean": 0.5, "score_low": 0.4, "score_high": 0.6, "argument": "k=1", "achieved": 0.2}
    found |= {f"reference_{name}": 0.1 for name in ("error", "skill", "rank_r_error", "top_k_error", "row_sum_defect")}
    return [found | {"budget": budget, "status": "ok"} | values for budget in budgets]


def cells(found):
    table = task_table(pandas.DataFrame(found), "recall")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_budgets_below_the_least_cost_share_a_line_and_are_marked():
    least = rows("a", (0.0625, 0.125), status="unreachable")
    (first, second) = cells(least + rows("a", (0.5,), argument="k=4", achieved=0.5))
    assert first[2:6] == ["0.500 (0.400, 0.600)", "0.0625*, 0.125*", "0.20", "k=1"]
    assert second[2:6] == ["", "0.5", "0.50", "k=4"]


def test_seeds_are_averaged():
    (found,) = cells(rows("a", (0.5,), reference_error=0.2) + rows("a", (0.5,), reference_error=0.6))
    assert found[6] == "0.40"


def test_a_method_that_does_not_apply_says_why():
    (found,) = cells(rows("a", (None,), score=None, reason="`causal=True` is not possible with A; take another"))
    assert found[5] == "`causal=True` is not possible with A"
    assert set(found[6:]) == {"–"}


def test_a_method_is_taken_from_the_last_table_that_has_it():
    older = pandas.DataFrame(rows("a", (0.5,), achieved=0.1) + rows("b", (0.5,), achieved=0.2))
    newer = pandas.DataFrame(rows("a", (0.25, 0.5), achieved=0.3))
    found = latest([older, newer])
    assert sorted(zip(found["method"], found["achieved"], strict=True)) == [("a", 0.3), ("a", 0.3), ("b", 0.2)]


def test_orders_stand_beside_what_was_declared():
    lines = orders_table({name: converged(name) for name in METHODS}).splitlines()
    named = {line.split("|")[2].strip(): [cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]}
    assert set(named) == {f"`{name}`" for name, method in METHODS.items() if method[2] is not None}
    performer = named["`performer`"]
    assert performer[2:5] == ["`num_features`", "0.5", "-0.50 ± 0.01 (kernel)"]
    assert performer[-1] == "0.09, 0.90"


def test_figures_are_of_the_methods_that_draw(tmp_path):
    results = {name: converged(name) for name in METHODS}
    write_figures(tmp_path, results, varied())
    assert {path.name for path in tmp_path.iterdir()} == {"convergence.png", "variance.png"}
    fixed = {name: result | {"randomized": False} for name, result in results.items() if name != "performer"}
    write_figures(tmp_path / "one", fixed | {"performer": results["performer"]}, varied())
    first, second = ((folder / "convergence.png").read_bytes() for folder in (tmp_path, tmp_path / "one"))
    assert first != second
