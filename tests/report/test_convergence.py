"""The figure of convergence: kernel estimates first, then outputs a logit scale, each label with its fitted slope."""

import pytest

from attnlens.report.convergence import panels
from attnlens.report.methods import slopes

from .synthetic import METHODS, converged


def test_panels_are_the_kernel_and_every_scale(cells):
    found = panels(cells.converge)
    assert [panel.title for panel in found] == [
        "kernel estimate, logit scale 0.1",
        "output, logit scale 0.1",
        "output, logit scale 1",
    ]
    assert {point["method"] for point in found[0].points} == {"performer"}
    with_budget = {name for name, method in METHODS.items() if method[2] is not None}
    assert {point["method"] for point in found[1].points} == with_budget


def test_only_outputs_have_the_null_and_targets_share_a_line(cells):
    kernel, *outputs = panels(cells.converge)
    assert kernel.nulls == []
    for panel, scale in zip(outputs, (0.1, 1.0), strict=True):
        assert panel.nulls == [{"target": "softmax", "error": pytest.approx(0.9 * scale)}]


def test_labels_carry_the_measured_and_the_declared_order_and_keep_apart(cells):
    kernel, output, _ = panels(cells.converge, height=310.0)
    assert [label["text"] for label in kernel.labels] == ["performer -0.50 (-0.5)"]
    assert {label["text"] for label in output.labels} == {label["method"] for label in output.labels}
    assert len({label["label_at"] for label in output.labels}) == len(output.labels)


def test_an_error_of_rounding_is_not_drawn(cells, monkeypatch):
    point = cells.converge["window"]["points"][0]
    monkeypatch.setitem(point, "error", 1e-12)
    drawn = panels(cells.converge)[1].points
    assert (point["argument"], "window") not in {(p["argument"], p["method"]) for p in drawn}


def test_slopes_in_words():
    assert slopes(converged("performer")) == "-0.50 ± 0.01 (kernel)"
    assert slopes(converged("softmax")) == "–"
