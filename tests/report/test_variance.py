"""The figure of variances: four curves, trained heads as points, labels apart."""

from itertools import pairwise

from attnlens.report.variance import COLORS, DRAWN, curves

from .synthetic import varied


def test_every_kind_has_its_curve_and_its_label():
    ladder, heads, labels = curves(varied())
    assert {row["features"] for row in ladder} == set(COLORS)
    assert len(ladder) == 2 * len(COLORS)
    assert [row["features"] for row in heads] == list(COLORS)
    assert heads[0]["head"] == "mqar, seed 0, 1.0"
    assert {row["features"]: row["variance"] for row in labels}["favor_sharp"] == 4.9


def test_labels_keep_apart_within_the_panel():
    *_, labels = curves(varied())
    places = sorted(row["label_at"] for row in labels)
    assert all(b - a > 0.5 for a, b in pairwise(places))
    assert DRAWN[0] <= places[0] <= places[-1] <= DRAWN[1]
