"""A family has one color wherever it appears."""

from attnlens.report.palette import FAMILY_COLORS, colors, symbols


def test_a_family_keeps_its_color_whatever_else_is_in_the_study():
    assert colors(["null", "kernel"])["kernel"] == colors(["kernel", "sparse", "exact"])["kernel"]


def test_families_differ():
    assert len(set(FAMILY_COLORS.values())) == len(FAMILY_COLORS)
    chosen = colors([*FAMILY_COLORS, "tensor", "hierarchical"])
    assert len(set(chosen.values())) == len(chosen)


def test_methods_of_a_family_differ_in_symbol():
    chosen = symbols({"mean": "null", "window": "sparse", "identity": "null"})
    assert chosen["mean"] != chosen["identity"]
