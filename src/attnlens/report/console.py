"""The table that ends a run: one line a method, the headline score and the error of every task."""

from collections.abc import Sequence

from attnlens.report.cells import Cells
from attnlens.report.columns import Row
from attnlens.report.table import headline_rows, mean_of
from attnlens.report.verdicts import share

WIDTH = 100
COLUMN = 20
SHORT = {"bits_per_character": "bits/char"}


def console(cells: Cells, rows: Sequence[Row]) -> str:
    """At most 100 columns wide; tasks that do not fit beside each other go below."""
    first = max(len("method"), *(len(attention) for attention in cells.axes.attention)) + 2
    beside = max(1, (WIDTH - first) // COLUMN)
    tasks = cells.axes.data
    blocks = [tasks[start : start + beside] for start in range(0, len(tasks), beside)]
    lines = [line for block in blocks for line in (*_block(cells, rows, block, first), "")]
    lines.append(
        f"score: mean of {len(cells.seeds)} seeds; error: relative output error on the reference model's Q, K, V"
    )
    lines.append(
        f"at {share(cells.headline)} of exact attention's FLOPs (*: that budget is unreachable; –: not applicable)"
    )
    lines += [f"stray, in no number: {stray}" for stray in cells.strays]
    return "\n".join(line.rstrip() for line in lines)


def _block(cells: Cells, rows: Sequence[Row], tasks: Sequence[str], first: int) -> list[str]:
    lines = [" " * first + "".join(f"{task[: COLUMN - 2]:>{COLUMN}}" for task in tasks)]
    metrics = [str(cells.meta[task]["metric"]) for task in tasks]
    units = [SHORT.get(metric, metric)[:10] for metric in metrics]
    lines.append(f"{'method':<{first}}" + "".join(f"{unit:>{COLUMN - 9}}{'error':>9}" for unit in units))
    for attention in cells.axes.attention:
        parts = [[r for r in rows if r["method"] == attention and r["task"] == task] for task in tasks]
        lines.append(f"{attention:<{first}}" + "".join(_entry(cells, part) for part in parts))
    return lines


def _entry(cells: Cells, part: Sequence[Row]) -> str:
    score = part[0]["score_mean"]
    picked = headline_rows(part, cells.headline)
    error = mean_of(picked, "reference_error")
    star = " " if all(row["status"] == "ok" for row in picked) else "*"
    shown = "–" if score is None else f"{score:.3f}"
    return f"{shown:>{COLUMN - 9}}" + (f"{'–':>9}" if error is None else f"{error:>8.3f}{star}")
