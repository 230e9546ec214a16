"""The charts: one panel a task, one color a family, and images that are equal bytes for equal charts."""

import subprocess
import sys

import pytest

from attnlens.report.figures import figures
from attnlens.report.palette import FAMILY_COLORS


@pytest.fixture(scope="module")
def specs(cells, rows):
    return figures(cells, rows)


def nodes(value):
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from nodes(entry)


def test_every_figure_has_a_panel_a_task(specs):
    assert list(specs) == [
        "accuracy",
        "error",
        "prediction",
        "heads",
        "convergence",
        "variance",
        "caches",
        "substitution",
    ]
    for spec in (
        spec for name, spec in specs.items() if name not in ("convergence", "variance", "caches", "substitution")
    ):
        assert [panel["title"]["text"] for panel in spec["concat"]] == ["mqar", "shakespeare"]


def test_a_family_has_one_color_in_all_figures(specs):
    for spec in specs.values():
        for node in nodes(spec["concat"]):
            if node.get("field") == "family" and "scale" in node:
                scale = dict(zip(node["scale"]["domain"], node["scale"]["range"], strict=True))
                assert scale == {name: FAMILY_COLORS[name] for name in scale}


def test_named_data_is_there(specs):
    for spec in specs.values():
        names = {node["data"]["name"] for node in nodes(spec["concat"]) if "data" in node}
        assert names == set(spec["datasets"])


def test_errors_are_drawn_on_logarithmic_axes_with_a_switch_of_source_and_legends_that_pick(specs):
    spec = specs["error"]
    scales = {
        n["field"]: n["scale"]["type"]
        for n in nodes(spec["concat"])
        if n.get("field") in ("error", "achieved") and "scale" in n
    }
    assert scales == {"error": "log", "achieved": "log"}
    bound = {param["name"]: param["bind"] for param in spec["params"]}
    assert bound["source"]["options"] == ["reference", "own"]
    assert bound["family_pick"] == bound["method_pick"] == "legend"


def test_images_have_equal_bytes_in_another_process(root, tmp_path):
    code = (
        "import sys; from pathlib import Path; from attnlens.report.cells import read_cells;"
        "from attnlens.report.table import join; from attnlens.report.figures import figures, write_images;"
        "cells = read_cells(Path(sys.argv[1])); write_images(Path(sys.argv[2]), figures(cells, join(cells)))"
    )
    subprocess.run([sys.executable, "-c", code, str(root), str(tmp_path)], check=True)
    first = {path.name: path.read_bytes() for path in (root / "results/figures").iterdir()}
    names = ("accuracy", "error", "prediction", "heads", "convergence", "variance", "caches", "substitution")
    assert set(first) == {f"{name}.png" for name in names}
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
