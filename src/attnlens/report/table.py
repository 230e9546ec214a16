"""One table: a row per (method, budget, task, seed) joins the test score with the error on that very model's Q, K, V.

A cell that mathematics rules out is a row as well, with its reason in place of numbers.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from attnlens.files import atomic, write_json
from attnlens.report.cells import Cells
from attnlens.report.columns import COLUMNS, MEASURES, SOURCES, Row

# Scores are copied from one file to the other, so they differ by rounding in JSON at most.
STALE = 1e-9


def join(cells: Cells) -> list[Row]:
    """The rows of the table, in the order of params.yaml: method, task, budget, seed.

    Raises:
        ValueError: a listed measurement is missing or out of date, with the command that makes it.
    """
    rows = []
    for attention in cells.axes.attention:
        for data in cells.axes.data:
            rows += _rows_of(cells, attention, data)
    return rows


def ladder(cells: Cells, attention: str) -> tuple[float | None, ...]:
    """The budgets of an operator; one without a budget argument has the single entry None."""
    return cells.axes.budgets if cells.approximate[attention]["budget_argument"] else (None,)


def _rows_of(cells: Cells, attention: str, data: str) -> list[Row]:
    approximate = cells.approximate[attention]
    base: Row = dict.fromkeys(column.name for column in COLUMNS)
    base |= {"method": attention, "family": approximate["family"], "target": approximate["target"], "task": data}
    base |= {"metric": cells.meta[data]["metric"], "higher_is_better": cells.meta[data]["higher_is_better"]}
    trained = cells.trained[attention, data]
    if trained["status"] != "ok":
        return [base | {"status": "not applicable", "reason": trained["reason"]}]
    excluded = {entry["data"]: entry["reason"] for entry in approximate["not_applicable"]}
    rows = []
    for seed in cells.seeds:
        scored = base | {"seed": seed, "status": "ok"} | _score(cells, attention, data, seed)
        if data in excluded:
            rows.append(scored | {"status": "not applicable", "reason": f"no error: {excluded[data]}"})
            continue
        scored |= _as_trained(cells, attention, data, seed)
        for budget in ladder(cells, attention):
            rows.append(scored | {"budget": budget} | _measured(cells, attention, data, seed, budget))
    return sorted(rows, key=lambda row: (row["budget"] or 0.0, row["seed"]))


def _score(cells: Cells, attention: str, data: str, seed: int) -> Row:
    value = cells.metrics[attention, data, seed]["value"]
    summary = cells.accuracy[data, attention]
    seeds = [int(entry) for entry in summary.get("seeds") or []]
    if seed not in seeds or not math.isclose(summary["values"][seeds.index(seed)], value, rel_tol=STALE, abs_tol=STALE):
        raise ValueError(
            f"results/accuracy.json does not hold the score {value} of models/{attention}/{data}/seed{seed}: "
            "run `dvc repro accuracy`"
        )
    versus = (summary.get("versus") or {}).get(cells.axes.reference) or {}
    return {
        "score": value,
        "score_mean": summary["mean"],
        "score_low": summary["low"],
        "score_high": summary["high"],
        "difference": versus.get("difference"),
        "difference_low": versus.get("low"),
        "difference_high": versus.get("high"),
        "p_value": versus.get("p_adjusted"),
        "verdict": _text(summary.get("verdict")),
    }


def _measured(cells: Cells, attention: str, data: str, seed: int, budget: float | None) -> Row:
    row: Row = {}
    parts = {source: _part(cells, attention, data, seed, budget, source) for source in SOURCES}
    for source, part in parts.items():
        for measure in MEASURES:
            row[f"{source}_{measure.name}"] = _reduced(part, measure.field, measure.reduce)
    own = parts["own"]
    for name in ("achieved", "flops", "exact_flops", "rank", "k", "draws"):
        row[name] = _reduced(own, name, "mean")
    row["argument"] = _argument(own)
    row["reachable"] = all(entry["reachable"] for part in parts.values() for entry in part)
    if not row["reachable"]:
        achieved = row["achieved"]
        nearest = "no setting comes near" if achieved is None else f"the nearest setting costs {achieved:.3g} of exact"
        row |= {"status": "unreachable", "reason": f"budget {budget} is unreachable: {nearest}"}
    return row


def _as_trained(cells: Cells, attention: str, data: str, seed: int) -> Row:
    """What the operator did in its own model, with the argument and the draw it was trained with."""
    entries = cells.approximate[attention]["trained"]
    part = [entry for entry in entries if entry["data"] == data and entry["seed"] == seed]
    if not part:
        raise ValueError(
            f"results/approximate/{attention}.json measures no operator as trained for data `{data}`, seed {seed}: "
            f"run `dvc repro -f approximate@{attention}`"
        )
    means = {f"trained_{name}": _reduced(part, name, "mean") for name in ("error", "skill", "achieved")}
    return means | {"trained_argument": _argument(part)}


def _part(cells: Cells, attention: str, data: str, seed: int, budget: float | None, source: str) -> Sequence[Row]:
    part = [
        entry
        for entry in cells.approximate[attention]["rows"]
        if entry["data"] == data
        and entry["source"] == source
        and entry["seed"] == seed
        and _same(entry["budget"], budget)
    ]
    if not part:
        raise ValueError(
            f"results/approximate/{attention}.json has no row for data `{data}`, source `{source}`, seed {seed}, "
            f"budget {budget}: run `dvc repro -f approximate@{attention}`"
        )
    return part


def _same(left: float | None, right: float | None) -> bool:
    return left is right if left is None or right is None else math.isclose(left, right)


def _reduced(part: Iterable[Row], field: str, reduce: str) -> float | None:
    values = [float(entry[field]) for entry in part if isinstance(entry.get(field), int | float)]
    if not values:
        return None
    # fsum is exact, so the order of layers and heads in the file leaves no trace.
    return {"mean": math.fsum(values) / len(values), "min": min(values), "max": max(values)}[reduce]


def _argument(part: Iterable[dict]) -> str | None:
    chosen = {", ".join(f"{name}={value}" for name, value in sorted((e.get("argument") or {}).items())) for e in part}
    return " | ".join(sorted(chosen - {""})) or None


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` as Parquet; equal rows give equal bytes (fixed schema and order, no writer metadata of the day)."""
    import pyarrow
    import pyarrow.parquet

    kinds = {
        "text": pyarrow.string(),
        "integer": pyarrow.int64(),
        "number": pyarrow.float64(),
        "flag": pyarrow.bool_(),
    }
    schema = pyarrow.schema([(column.name, kinds[column.kind]) for column in COLUMNS])
    with atomic(path) as aside:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), aside)


def mean_of(rows: Iterable[Row], name: str) -> float | None:
    """Mean of a numeric column over the rows that have it."""
    return _reduced(rows, name, "mean")


def headline_rows(rows: Iterable[Row], budget: float) -> list[Row]:
    """The rows that stand for a method in one number: those of one budget, or of a method that has none."""
    return [row for row in rows if row["budget"] is None or _same(float(row["budget"]), budget)]


def summarize(cells: Cells, rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Per data set and method: the headline score, the mean own and reference error at one budget."""
    summary: dict[str, dict[str, Row]] = {data: {} for data in cells.axes.data}
    for attention in cells.axes.attention:
        for data in cells.axes.data:
            chosen = [row for row in rows if row["method"] == attention and row["task"] == data]
            picked = headline_rows(chosen, cells.headline)
            metric = cells.meta[data]["metric"]
            if chosen[0]["score"] is None:
                summary[data][attention] = {"status": "not applicable"}
                continue
            summary[data][attention] = {
                metric: chosen[0]["score_mean"],
                "error_own": mean_of(picked, "own_error"),
                "error_reference": mean_of(picked, "reference_error"),
            }
    return summary


def write_summary(path: Path, cells: Cells, rows: Sequence[Row]) -> None:
    """Write the small DVC metrics file of `summarize`."""
    write_json(path, {"budget": cells.headline, "data": summarize(cells, rows)})
