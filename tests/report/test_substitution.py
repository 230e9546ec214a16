"""The figure of substitutions: panels a subject, labels apart, refusals left out."""

from itertools import pairwise

from attnlens.report.labels import LINE_PIXELS
from attnlens.report.substitution import HEIGHT, panels

from .synthetic import replaced


def results():
    return {("shakespeare", name): replaced(name) for name in ("window", "performer", "smyrf")}


def test_a_subject_has_a_panel_of_layers_and_one_of_counts():
    one, many = panels(results())
    assert (one.subject, one.metric, one.exact) == ("shakespeare", "bits_per_character", 2.74)
    assert {point["method"] for point in one.points} == {"window", "performer"}
    assert [p["value"] for p in one.points if p["method"] == "window" and p["state"] == "as is"] == [
        2.74 + 0.4,
        2.74 + 0.8,
    ]
    assert [p["at"] for p in many.points if p["method"] == "window" and p["state"] == "matched"] == [1, 2]
    for panel in (one, many):
        assert panel.domain[0] < panel.exact < max(float(p["value"]) for p in panel.points) < panel.domain[1]


def test_labels_keep_apart():
    for panel in panels(results()):
        scale = HEIGHT / (panel.domain[1] - panel.domain[0])
        places = sorted(float(label["label_at"]) * scale for label in panel.labels)
        assert all(b - a > LINE_PIXELS - 1e-6 for a, b in pairwise(places))


def test_a_study_of_refusals_has_no_panel():
    assert panels({("shakespeare", "smyrf"): replaced("smyrf")}) == []
