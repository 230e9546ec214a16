"""The figure of conversions."""

import pytest

from attnlens.report.conversions import COLORS, HOPELESS, points, write_figure

ROWS = [
    {
        "conversion": "transmla",
        "setting": "r = 8, fold 1",
        "exact": False,
        "value": 30.0,
        "parameters": 0.8,
        "cache": 16,
    },
    {
        "conversion": "transmla",
        "setting": "r = 8, fold 4",
        "exact": False,
        "value": 1e9,
        "parameters": 0.8,
        "cache": 16,
    },
    {"conversion": "joint_svd", "setting": "r = 8", "exact": True, "value": 17.0, "parameters": 0.5, "cache": 8},
]
RESULT = {"model": "smollm2", "metric": "perplexity", "value": 17.0, "rows": ROWS}


def test_folds_are_lines_of_their_own_and_the_hopeless_stand_at_the_edge():
    first, second, third = points(RESULT)
    assert len({first["line"], second["line"], third["line"]}) == 3
    assert (first["drawn"], second["drawn"]) == (30.0, 17.0 * HOPELESS)
    assert {row["conversion"] for row in ROWS} <= set(COLORS)


def test_it_is_drawn_and_nothing_is_refused(tmp_path):
    write_figure(tmp_path / "a.png", [RESULT])
    write_figure(tmp_path / "b.png", [RESULT])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="`results` is empty: run"):
        write_figure(tmp_path / "c.png", [])
