"""The table of benchmarks/peers.json in Markdown: our operators beside the packages that people use."""

from collections.abc import Mapping

HEAD = (
    *("operator", "n", "ms", "times the peer's speed", "2 threads", "times exact attention's", "peak MB"),
    *("error on real Q, K, V", "row sums off by", "future leak", "goal"),
)


def benchmark_table(stored: Mapping) -> str:
    """One line a case, in the order of the benchmark's list; a pair `ours / peer` where both have a value."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += ["| " + " | ".join(_cells(case)) + " |" for case in map(stored["cases"].get, stored["order"])]
    return "\n".join(lines)


def _cells(case: Mapping) -> list[str]:
    one, two = (case.get(f"threads_{count}") or {} for count in (1, 2))
    mode = ", causal" if case["causal"] and "causal" not in case["name"] else ""
    return [
        f"`{case['method']}`" + _detail(case) + mode + (", with backward" if case["backward"] else ""),
        str(case["length"]),
        f"{one['ours_ms']:.0f}",
        case["skipped"] if "skipped" in case else _ratio(one, "peer"),
        _ratio(two, "peer"),
        _ratio(one, "exact"),
        _pair(case.get("ours_peak_mb"), case.get("peer_peak_mb"), "{:.0f}"),
        *(_probes(case, name, shape) for name, shape in PROBES),
        _goal(case),
    ]


PROBES = (("error_real", "{:.2f}"), ("row_sum_defect", "{:.0e}"), ("future_leak", "{:.0e}"))


def _detail(case: Mapping) -> str:
    return case["name"].removeprefix(case["method"]).replace(str(case["length"]), "").replace("train", "").rstrip()


def _ratio(times: Mapping, side: str) -> str:
    if f"{side}_ratio" not in times:
        return "–"
    median, low, high = times[f"{side}_ratio"]
    return f"{median:.2f} ({low:.2f}, {high:.2f})"


def _probes(case: Mapping, name: str, shape: str) -> str:
    ours, theirs = ((case.get(f"{side}_probe") or {}).get(name) for side in ("ours", "peer"))
    return _pair(ours, theirs, shape)


def _pair(ours: float | None, theirs: float | None, shape: str) -> str:
    shown = [_shown(value, shape) for value in (ours, theirs) if value is not None]
    return " / ".join(shown) or "–"


def _shown(value: float, shape: str) -> str:
    return "0" if value == 0 else shape.format(value)


def _goal(case: Mapping) -> str:
    """Every goal with whether this run reached it."""
    words = {"peer": "{:g} x peer", "exact": "{:g} x exact", "memory": "{:.0%} of its memory"}
    parts = []
    for name, goal in case["goal"].items():
        if name == "memory":
            reached = "peer_peak_mb" in case and case["ours_peak_mb"] <= goal * case["peer_peak_mb"]
        else:
            reached = case["threads_1"].get(f"{name}_ratio", [0.0])[0] >= goal
        parts.append(words[name].format(goal) + (" ✓" if reached else " ✗"))
    return ", ".join(parts) or "–"
