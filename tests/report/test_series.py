"""What the figures draw is what the table holds."""

import math

from attnlens.report.series import NULL, RANK, TOP, accuracy_points, decades, heads, not_drawn, predictions, tradeoff
from tests.report.synthetic import BUDGETS, METHODS


def test_scores_are_sorted_best_first_and_absent_ones_last(cells):
    points = accuracy_points(cells, "shakespeare")
    means = [point["mean"] for point in points if point["mean"] is not None]
    assert means == sorted(means)
    assert {point["label"] for point in points[len(means) :]} == {"smyrf", "nystromformer"}
    assert all(point["reason"] for point in points[len(means) :])
    assert {p["label"] for p in points if p["family"] is None} == {
        f"baseline: {n}" for n in ("bigram", "trigram", "4-gram")
    }
    accuracies = [point["mean"] for point in accuracy_points(cells, "mqar")]
    assert accuracies == sorted(accuracies, reverse=True)


def test_curves_are_means_over_seeds_of_approximating_methods(cells, rows):
    curve = tradeoff(cells, rows, "mqar", 300.0)
    drawn = {record["method"] for record in curve.methods}
    assert drawn == set(METHODS) - {"softmax", "mean", "identity"}
    assert not_drawn(cells, rows) == ["softmax"]
    for source in ("own", "reference"):
        (point,) = [r for r in curve.methods if (r["method"], r["budget"], r["source"]) == ("window", 0.5, source)]
        part = [r for r in rows if (r["method"], r["task"], r["budget"]) == ("window", "mqar", 0.5)]
        assert math.isclose(point["error"], sum(row[f"{source}_error"] for row in part) / 2)


def test_null_and_oracles_accompany_both_sources(cells, rows):
    curve = tradeoff(cells, rows, "mqar", 300.0)
    for source in ("own", "reference"):
        names = [record["name"] for record in curve.context if record["source"] == source]
        assert {name: names.count(name) for name in names} == {NULL: 2, RANK: len(BUDGETS), TOP: len(BUDGETS)}
    low, high = curve.domain
    assert all(low < record["error"] < high for record in (*curve.methods, *curve.context))
    assert all(low <= label["label_at"] <= high for label in curve.labels)


def test_oracles_are_of_rows_that_meet_the_budget(cells, rows):
    """Rows that missed 1/16 once lent their cheaper oracles to the curve at 1/16."""
    spoiled = [dict(row) for row in rows]
    for row in spoiled:
        if row["status"] == "unreachable":
            row["reference_rank_r_error"] = 100.0
    assert tradeoff(cells, spoiled, "mqar", 300.0).context == tradeoff(cells, rows, "mqar", 300.0).context


def test_decades_lie_inside():
    assert decades(0.03, 3.0) == [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]


def test_a_method_without_a_score_predicts_nothing(cells, rows):
    cloud = predictions(cells, rows, "shakespeare", (400.0, 300.0))
    assert {point["method"] for point in cloud.points} == set(METHODS) - {"smyrf", "nystromformer"}
    assert all(cloud.skills[0] < point["skill"] < cloud.skills[1] for point in cloud.points)
    assert all(cloud.scores[0] < point["low"] <= point["high"] < cloud.scores[1] for point in cloud.points)


def test_heads_cover_every_method_or_say_why_not(cells):
    measured, absent = heads(cells, "shakespeare")
    assert {record["method"] for record in measured} | {record["method"] for record in absent} == set(METHODS)
    assert all(record["reason"] for record in absent)
    assert len([record for record in measured if record["method"] == "window"]) == 4
