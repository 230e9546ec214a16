"""A study's table as a page of Markdown: every method on every budget, task by task; and the orders of convergence.

    python -m attnlens.report.study docs/study.md results/table.parquet
    python -m attnlens.report.study docs/study.md results/table.parquet --converge results/converge --figures figures

What stands between `<!-- task -->` and `<!-- /task -->` is replaced for each task of the table, and what stands between
`<!-- orders -->` and `<!-- /orders -->`; the rest of the page is kept. Rows average over seeds. Of several tables, or
folders, a method is taken from the last that has it. Figures are of the methods that draw, and of the variance beside
the last folder.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import pandas

from attnlens.files import atomic, read_json
from attnlens.report.methods import slopes
from attnlens.report.readme import fill

HEAD = (
    *("family", "method", "score (95 %)", "budget", "cost", "argument"),
    *("error", "skill", "best rank r", "exact top k", "row sums"),
)
MEASURED = ("error", "skill", "rank_r_error", "top_k_error")
# The budget whose output errors stand for a curve.
SHOWN = 64


def task_table(table: pandas.DataFrame, task: str) -> str:
    """Lines of a method on its budgets, in the order of families; scores stand on the first, a star marks a budget
    that the method cannot reach, measured at the nearest cost that it can."""
    rows = table.loc[table["task"] == task]
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    families = rows.drop_duplicates("method").sort_values("family", kind="stable")
    for method, family in zip(families["method"], families["family"], strict=True):
        of_method = rows.loc[rows["method"] == method]
        if of_method["score"].isna().all():
            reason = of_method["reason"].dropna().iloc[0]
            cells = [str(family), f"`{method}`", "–", "–", "–", _short(reason), *["–"] * (len(MEASURED) + 1)]
            lines.append("| " + " | ".join(cells) + " |")
            continue
        by_budget = of_method.groupby(of_method["budget"].fillna(0), sort=True)
        measured = [(_budget(budget, part), _measured(part)) for budget, part in by_budget]
        score = _score(of_method)
        # Budgets below the least cost of a method have one row: it says the same for each of them.
        for cells, alike in groupby(measured, key=lambda row: row[1]):
            budgets = ", ".join(budget for budget, _ in alike)
            lines.append("| " + " | ".join([str(family), f"`{method}`", score, budgets, *cells]) + " |")
            score = ""
    return "\n".join(lines)


def _score(part: pandas.DataFrame) -> str:
    mean, low, high = (part[name].iloc[0] for name in ("score_mean", "score_low", "score_high"))
    return f"{mean:.3f} ({low:.3f}, {high:.3f})"


def _budget(budget: float, part: pandas.DataFrame) -> str:
    return ("–" if budget == 0 else f"{budget:g}") + ("*" if "unreachable" in set(part["status"]) else "")


def _measured(part: pandas.DataFrame) -> list[str]:
    """Achieved cost, argument and errors on the reference model's Q, K, V, means over seeds."""
    argument = part["argument"].dropna()
    return [
        _number(part.loc[:, "achieved"].mean()),
        argument.iloc[0] if len(argument) else "–",
        *(_number(part.loc[:, f"reference_{name}"].mean()) for name in MEASURED),
        _number(part.loc[:, "reference_row_sum_defect"].max(), digits=1),
    ]


def _number(value: float, digits: int = 2) -> str:
    if pandas.isna(value):
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 0.01 or digits == 1 else f"{value:.2f}"


def _short(reason: str) -> str:
    return reason.split(";")[0].split(":")[0].replace("|", "/")


def latest(tables: Sequence[pandas.DataFrame]) -> pandas.DataFrame:
    """All rows, those of a method from the last table that has it."""
    kept: list[pandas.DataFrame] = []
    for table in tables:
        methods = table["method"].unique().tolist()
        kept = [*(older.loc[~older["method"].isin(methods)] for older in kept), table]
    return pandas.concat(kept, ignore_index=True)


def orders_table(results: Mapping[str, Mapping]) -> str:
    """Declared order, measured slope, and output errors at one budget, of every method that has a curve."""
    scales = sorted({point["logit_scale"] for result in results.values() for point in result["points"]})
    head = ["family", "method", "budget", "declared", "slope (of)"]
    head += [f"error at {SHOWN}, logit scale {scale:g}" for scale in scales] + ["mean(V)"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, result in sorted(results.items(), key=lambda item: (item[1]["family"], item[0])):
        if not result["points"]:
            continue
        at = {p["logit_scale"]: p["error"] for p in result["points"] if p["argument"] == SHOWN}
        null = {entry["logit_scale"]: entry["error"] for entry in result["null"]}
        order = "–" if result["order"] is None else f"{result['order']:g}"
        cells = [result["family"], f"`{name}`", f"`{result['budget']}`", order, slopes(result)]
        cells += [_error(at.get(scale)) for scale in scales] + [", ".join(_error(null.get(s)) for s in scales)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_figures(folder: Path, results: Mapping[str, Mapping], variance: Mapping) -> None:
    """convergence.png of the methods that draw, and variance.png."""
    from attnlens.report.convergence import convergence_figure
    from attnlens.report.figures import write_images
    from attnlens.report.style import Style
    from attnlens.report.variance import variance_figure

    drawn = {name: result for name, result in results.items() if result["randomized"] and result["points"]}
    charts = {
        "convergence": lambda style: convergence_figure(drawn, style),
        "variance": lambda style: variance_figure(variance, style),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, chart in charts.items():
        style = Style({method: str(result["family"]) for method, result in drawn.items()})
        write_images(folder, {name: style.specification(chart(style))}, scale=1)


def _error(value: float | None) -> str:
    return "–" if value is None else "0" if value < 1e-9 else _number(value)


def _read(path: Path) -> dict:
    found = read_json(path)
    assert isinstance(found, dict), f"{path} holds no record"
    return found


def main() -> None:
    """Fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a page with a place for each task")
    parser.add_argument("table", type=Path, nargs="+", help="results/table.parquet of the study, or of several")
    parser.add_argument("--converge", type=Path, nargs="*", default=[], help="results/converge of the same studies")
    parser.add_argument("--figures", type=Path, help="where to write the figures of convergence and variance")
    paths = parser.parse_args()
    table = latest([pandas.read_parquet(path) for path in paths.table])
    tables = {task: task_table(table, task) for task in table["task"].unique()}
    files = [file for folder in paths.converge for file in sorted(folder.glob("*.json"))]
    if files:
        results = {file.stem: _read(file) for file in files}
        tables["orders"] = orders_table(results)
        if paths.figures is not None:
            write_figures(paths.figures, results, _read(paths.converge[-1].parent / "variance.json"))
    text = fill(paths.page.read_text(encoding="utf-8"), tables, paths.page.name)
    with atomic(paths.page) as aside:
        aside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
