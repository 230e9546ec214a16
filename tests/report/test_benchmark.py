"""The benchmark's table says what was measured, and whether each goal was reached."""

from attnlens.report.benchmark import benchmark_table


def case(**changes):
    found = {
        "name": "window 8192",
        "method": "window",
        "length": 8192,
        "causal": True,
        "backward": False,
        "goal": {"peer": 4, "exact": 6, "memory": 0.2},
        "threads_1": {"ours_ms": 12.0, "peer_ratio": [4.5, 4.0, 5.0], "exact_ratio": [5.9, 5.0, 7.0]},
        "ours_peak_mb": 30.0,
        "peer_peak_mb": 100.0,
        "ours_probe": {"error_real": 0.5, "row_sum_defect": 1e-6, "future_leak": 0.0},
        "peer_probe": None,
    }
    return found | changes


def table(**changes):
    found = case(**changes)
    lines = benchmark_table({"cases": {found["name"]: found}, "order": [found["name"]]}).splitlines()
    return [cell.strip() for cell in lines[-1].strip("|").split("|")]


def test_a_goal_that_is_missed_is_marked():
    row = table()
    assert row[:3] == ["`window`, causal", "8192", "12"]
    assert row[3] == "4.50 (4.00, 5.00)"
    assert row[-1] == "4 x peer ✓, 6 x exact ✗, 20% of its memory ✗"


def test_values_without_a_peer_stand_alone_and_zero_is_zero():
    row = table()
    assert row[6:10] == ["30 / 100", "0.50", "1e-06", "0"]


def test_an_absent_peer_is_named():
    times = {"ours_ms": 1.0, "exact_ratio": [1.0, 1.0, 1.0]}
    assert table(skipped="local_attention is not installed", threads_1=times)[3] == "local_attention is not installed"
