"""The findings in sentences, built from the numbers: nothing here is written by hand for one study."""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from attnlens.report.cells import Cells
from attnlens.report.columns import Row
from attnlens.report.series import baselines, not_drawn, predictions
from attnlens.report.table import headline_rows, mean_of

# Below this many seeds an interval is an indication and no ranking is claimed.
ENOUGH_SEEDS = 3


class Finding(NamedTuple):
    """A sentence under a heading."""

    heading: str
    text: str


def findings(cells: Cells, rows: Sequence[Row]) -> list[Finding]:
    """What the study shows, then what it cannot show: exclusions, unreachable budgets, seeds, strays."""
    found = [_scores(cells, task) for task in cells.axes.data]
    found += [_errors(cells, rows, task) for task in cells.axes.data]
    found += _no_information(cells, rows)
    found += [_prediction(cells, rows, task) for task in cells.axes.data]
    found += _exclusions(cells, rows)
    return found


def share(budget: float) -> str:
    """A budget as people write it: 1/4, 0.3."""
    fraction = Fraction(budget).limit_denominator(64)
    return str(fraction) if math.isclose(float(fraction), budget) else f"{budget:.3g}"


def words(names: Iterable[str]) -> str:
    """a, b and c."""
    names = list(names)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def ranking(cells: Cells, task: str) -> list[tuple[str, float]]:
    """Methods that have a score on `task`, best first."""
    sign = -1 if cells.meta[task]["higher_is_better"] else 1
    scored = [a for a in cells.axes.attention if cells.trained[a, task]["status"] == "ok"]
    return sorted(((a, cells.accuracy[task, a]["mean"]) for a in scored), key=lambda pair: sign * pair[1])


def _scores(cells: Cells, task: str) -> Finding:
    meta = cells.meta[task]
    metric = meta["metric"].replace("_", " ")
    order = ranking(cells, task)
    families = {attention: cells.approximate[attention]["family"] for attention, _ in order}
    best = words(f"{name} ({value:.3f})" for name, value in order[:3])
    text = f"Best in {metric} ({'higher' if meta['higher_is_better'] else 'lower'} is better): {best}."
    nulls = [name for name, _ in order if families[name] == "null"]
    if nulls:
        behind = [name for name, _ in order[order.index((nulls[0], dict(order)[nulls[0]])) :] if name not in nulls]
        text += f" The best null is {nulls[0]} ({dict(order)[nulls[0]]:.3f})"
        text += f"; {words(behind)} {'does' if len(behind) == 1 else 'do'} not beat it." if behind else "."
    text += _comparison(cells, task)
    known = baselines(meta)
    if known:
        text += f" Baselines: {words(f'{name} {value:.3f}' for name, value in known.items())}."
    return Finding(f"{task}: test score", text)


def _comparison(cells: Cells, task: str) -> str:
    """The paired comparisons with the reference method, by verdict."""
    groups: dict[str, list[str]] = {}
    for attention in cells.axes.attention:
        row = cells.accuracy[task, attention]
        if row["status"] == "ok" and row["verdict"] and attention != cells.axes.reference:
            groups.setdefault(str(row["verdict"]), []).append(attention)
    if not groups:
        return ""
    named = [f"{verdict}: {words(names) if len(groups) > 1 else 'all'}" for verdict, names in groups.items()]
    return f" Against {cells.axes.reference}, {'; '.join(named)}."


def _errors(cells: Cells, rows: Sequence[Row], task: str) -> Finding:
    part = headline_rows([row for row in rows if row["task"] == task], cells.headline)
    # Errors are compared at equal cost: who missed the budget, or has none to choose, is not ranked.
    tuned = [row for row in part if row["budget"] is not None and row["reachable"]]
    errors = _by_method([row for row in tuned if row["family"] != "null"], "reference_error")
    exact = set(not_drawn(cells, rows))
    ranked = sorted((error, name) for name, error in errors.items() if name not in exact)
    heading = f"{task}: error at {share(cells.headline)} of exact attention's FLOPs"
    if not ranked:
        return Finding(heading, "No method meets this budget.")
    text = f"Smallest on the reference model's Q, K, V: {words(f'{name} ({error:.3g})' for error, name in ranked[:3])}."
    null = mean_of(part, "reference_error_mean_v")
    rank, top = mean_of(tuned, "reference_rank_r_error"), mean_of(tuned, "reference_top_k_error")
    marks = [("mean(V)", null), ("the best rank-r matrix", rank), ("exact top-k", top)]
    known = [f"{name} has {value:.3g}" for name, value in marks if value is not None]
    return Finding(heading, f"{text} For comparison, {words(known)}." if known else text)


def _by_method(rows: Iterable[Row], column: str) -> dict[str, float]:
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(str(row["method"]), []).append(row)
    means = {name: mean_of(part, column) for name, part in parts.items()}
    return {name: value for name, value in means.items() if value is not None}


def _no_information(cells: Cells, rows: Sequence[Row]) -> Iterator[Finding]:
    named = []
    for task in cells.axes.data:
        part = headline_rows([r for r in rows if r["task"] == task and r["family"] != "null"], cells.headline)
        skills = _by_method(part, "reference_skill")
        named += [f"{name} on {task} (skill {skill:.2f})" for name, skill in skills.items() if skill >= 1]
    if named:
        what = "carries" if len(named) == 1 else "carry"
        text = f"{words(named)} {what} no information beyond mean(V) about the reference model's attention."
        yield Finding(f"Skill of 1 or more at {share(cells.headline)}", text)


def _prediction(cells: Cells, rows: Sequence[Row], task: str) -> Finding:
    points = predictions(cells, rows, task, (1.0, 1.0)).points
    heading = f"{task}: does error predict {cells.meta[task]['metric'].replace('_', ' ')}?"
    if len(points) < 4:
        return Finding(heading, f"{len(points)} methods are too few to say.")
    sign = 1 if cells.meta[task]["higher_is_better"] else -1
    rho = spearman([-float(p["skill"]) for p in points], [sign * float(p["score"]) for p in points])
    if rho is None:
        return Finding(heading, "All methods tie.")
    text = (
        f"Over {len(points)} methods, nulls included, the rank correlation between smaller error and better score is "
    )
    return Finding(heading, f"{text}{rho:+.2f} (Spearman; 1: the order is the same, 0: no relation).")


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation with mean ranks for ties; None where one side is constant."""
    a, b = _ranks(x), _ranks(y)
    mean = (len(x) + 1) / 2
    variance = math.fsum((r - mean) ** 2 for r in a) * math.fsum((r - mean) ** 2 for r in b)
    if variance == 0:
        return None
    return math.fsum((r - mean) * (s - mean) for r, s in zip(a, b, strict=True)) / math.sqrt(variance)


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def _exclusions(cells: Cells, rows: Sequence[Row]) -> Iterator[Finding]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "not applicable":
            cell = f"{row['method']} on {row['task']}"
            named = reasons.setdefault(str(row["reason"]), [])
            named += [] if cell in named else [cell]
    if reasons:
        yield Finding("Not applicable", "; ".join(f"{words(cell)}: {why}" for why, cell in reasons.items()) + ".")
    missed = sorted({(str(r["method"]), float(r["budget"])) for r in rows if r["status"] == "unreachable"})
    if missed:
        text = "; ".join(
            f"{name} at {words(share(b) for other, b in missed if other == name)}"
            for name in dict.fromkeys(name for name, _ in missed)
        )
        yield Finding("Unreachable budgets", f"{text}: no setting costs within 10 % of these shares on some task.")
    if len(cells.seeds) < ENOUGH_SEEDS:
        text = f"{len(cells.seeds)} a cell: intervals are an indication and no ranking is claimed below {ENOUGH_SEEDS}."
        yield Finding("Too few seeds", text)
    if cells.strays:
        text = f"{words(cells.strays)}: results of cells that params.yaml does not list; they are in no number here."
        yield Finding("Strays", text)
