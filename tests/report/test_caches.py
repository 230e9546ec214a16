"""The figure of caches: what its points are, and that it is drawn."""

import pytest

from attnlens.report.caches import points, write_figure


@pytest.fixture
def rows():
    found = []
    for policy, budget, bits, size, error in (
        ("full", None, None, 100, 0.0),
        ("full", None, 4, 20, 0.02),
        ("sliding", 8, None, 25, 0.4),
        ("sliding", 16, None, 50, 0.2),
    ):
        for layer in (0, 1):
            row = {"source": "drawn", "layer": layer, "policy": policy, "budget": budget, "bits": bits, "tokens": 32}
            found.append(
                row | {"bytes": size, "error": [error, 3 * error], "skill": [2 * error, 6 * error], "null": [0.5, 0.5]}
            )
    return found


def test_points_are_means_over_heads_and_layers_and_fractions_of_all_bytes(rows):
    found = {(row["policy"], row["budget"], row["store"]): row for row in points(rows)["drawn"]}
    assert found["sliding", 8, "full precision"]["bytes"] == 0.25
    assert found["sliding", 8, "full precision"]["error"] == pytest.approx(0.8)
    assert found["full", 32, "4 bits"]["skill"] == pytest.approx(0.08)


def test_it_is_drawn_and_equal_results_give_equal_bytes(rows, tmp_path):
    for name in ("one.png", "two.png"):
        write_figure(tmp_path / name, {"rows": rows})
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG")
    assert one == two


def test_a_result_without_rows_is_refused_with_its_reason(tmp_path):
    with pytest.raises(ValueError, match=r"`result` has no rows \(no causal model\): measure a causal model"):
        write_figure(tmp_path / "none.png", {"rows": [], "reason": "no causal model"})
