"""What the figures draw: rows of the joined table averaged over seeds, and where the labels at line ends go."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attnlens.report.cells import Cells
from attnlens.report.columns import SOURCES, Row
from attnlens.report.labels import LINE_PIXELS, beside, spread
from attnlens.report.table import headline_rows, ladder, mean_of

# Below this an error is rounding of float32, not approximation: such a method equals its target and has no place
# on a logarithmic axis of errors.
EXACT = 1e-4
# Skill is drawn on a scale that is linear up to about this value and logarithmic beyond, so that 0 has a place.
SYMLOG = 0.2
NULL, RANK, TOP = "mean(V): skill 1", "best rank r", "exact top k"


@dataclass(frozen=True)
class Curve:
    """One panel of error against budget: points of methods, null and oracle curves, labels, both domains."""

    methods: list[Row]
    context: list[Row]
    labels: list[Row]
    span: tuple[float, float]
    domain: tuple[float, float]


@dataclass(frozen=True)
class Cloud:
    """One panel of score against skill: points with the place of their label, and both domains."""

    points: list[Row]
    skills: tuple[float, float]
    scores: tuple[float, float]


def accuracy_points(cells: Cells, task: str) -> list[dict]:
    """One record a method and a baseline (of no family), best first; those without a score come last."""
    meta = cells.meta[task]
    points: list[dict] = [
        {"label": f"baseline: {name}", "family": None, "mean": value} for name, value in baselines(meta).items()
    ]
    for attention in cells.axes.attention:
        row = cells.accuracy[task, attention]
        trained = cells.trained[attention, task]
        scored = trained["status"] == "ok"
        point = {"label": attention, "method": attention, "family": cells.approximate[attention]["family"]}
        point |= {name: row.get(name) if scored else None for name in ("mean", "low", "high", "seeds", "values")}
        points.append(point | {"reason": None if scored else trained["reason"]})
    sign = -1 if meta["higher_is_better"] else 1
    return sorted(points, key=lambda point: math.inf if point["mean"] is None else sign * point["mean"])


def seed_points(points: Sequence[dict]) -> list[Row]:
    """The score of every seed beside the mean over them."""
    return [
        {"label": point["label"], "method": point["method"], "family": point["family"], "seed": seed, "score": score}
        for point in points
        for seed, score in zip(point.get("seeds") or (), point.get("values") or (), strict=True)
    ]


def baselines(meta: dict) -> dict[str, float]:
    """Named values of the metric that need no attention: chance and what the pipeline computed."""
    chance = {} if meta.get("chance") is None else {"chance": meta["chance"]}
    return chance | dict(sorted((meta.get("baselines") or {}).items()))


def tradeoff(cells: Cells, rows: Sequence[Row], task: str, height: float) -> Curve:
    """Error against achieved budget for both sources, averaged over seeds; `height` of the panel is in pixels."""
    methods: list[Row] = []
    context: list[Row] = []
    for source in SOURCES:
        means = [_mean_row(cells, rows, task, a, b, source) for a in cells.axes.attention for b in ladder(cells, a)]
        measured = [record for record in means if record["error"] is not None and record["error"] >= EXACT]
        # Nulls that cost next to nothing have no place on the axis of budgets; those with a ladder do.
        methods += [record for record in measured if record["family"] != "null" or record["budget"] is not None]
    limits = _span(cells, methods)
    for source in SOURCES:
        context += _context(cells, rows, task, source, limits)
    errors = [float(r["error"]) for r in (*methods, *context)] or [0.1, 1.0]
    low, high = min(errors) / 1.25, max(errors) * 1.25
    labels = [label for source in SOURCES for label in _labels(methods, source, low, high, height)]
    return Curve(methods, context, labels, limits, (low, high))


def _span(cells: Cells, methods: Sequence[Row]) -> tuple[float, float]:
    """The horizontal domain: the ladder and what lies near it; a point far from it stands at the edge."""
    low, high = min(cells.axes.budgets), max(cells.axes.budgets)
    near = [r["achieved"] for r in methods if r["achieved"] is not None and low / 4 <= r["achieved"] <= high * 4]
    return min([low, *near]) / 1.3, max([high, *near]) * 1.2


def decades(low: float, high: float) -> list[float]:
    """Ticks 1, 2, 5 of every decade in [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**exponent for exponent in range(first, last + 1) for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def not_drawn(cells: Cells, rows: Sequence[Row]) -> list[str]:
    """Methods without a point in the figure of errors, because they equal softmax to rounding everywhere."""
    drawn = {
        str(r["method"]) for r in rows for s in SOURCES if r[f"{s}_error"] is not None and r[f"{s}_error"] >= EXACT
    }
    measured = {str(r["method"]) for r in rows if r["own_error"] is not None}
    return [attention for attention in cells.axes.attention if attention in measured - drawn]


def _mean_row(cells: Cells, rows: Sequence[Row], task: str, attention: str, budget: float | None, source: str) -> Row:
    part = [r for r in rows if r["task"] == task and r["method"] == attention and r["budget"] == budget]
    record: Row = {"method": attention, "family": cells.approximate[attention]["family"], "source": source}
    record |= {name: mean_of(part, f"{source}_{name}") for name in ("error", "error_min", "error_max", "skill")}
    argument = next((row["argument"] for row in part if row["argument"]), None)
    return record | {"budget": budget, "achieved": mean_of(part, "achieved"), "argument": argument}


def _context(cells: Cells, rows: Sequence[Row], task: str, source: str, limits: tuple[float, float]) -> list[Row]:
    """The null over the whole axis, and the oracles at every budget: means over the models of the source."""
    part = [row for row in rows if row["task"] == task]
    context: list[Row] = []
    null = mean_of(part, f"{source}_error_mean_v")
    if null is not None:
        context += [{"name": NULL, "source": source, "achieved": x, "error": null} for x in limits]
    for name, column in ((RANK, "rank_r_error"), (TOP, "top_k_error")):
        for budget in cells.axes.budgets:
            # An oracle has the FLOPs that its row achieved: rows that miss the budget would blur the curve.
            met = [row for row in part if row["budget"] == budget and row["reachable"]]
            error, achieved = mean_of(met, f"{source}_{column}"), mean_of(met, "achieved")
            if error is not None and error >= EXACT:
                context.append({"name": name, "source": source, "achieved": achieved, "error": error})
    return context


def _labels(methods: Sequence[Row], source: str, low: float, high: float, height: float) -> list[Row]:
    """The last point of every method and the height of its label: as near as a line's height between them allows."""
    last: dict[str, Row] = {}
    for record in methods:
        if record["source"] == source and record["achieved"] is not None:
            last[str(record["method"])] = record
    scale = height / math.log(high / low)
    wanted = {name: scale * math.log(float(record["error"]) / low) for name, record in last.items()}
    placed = spread(wanted, LINE_PIXELS, height)
    return [record | {"label_at": low * math.exp(placed[name] / scale)} for name, record in last.items()]


def predictions(cells: Cells, rows: Sequence[Row], task: str, size: tuple[float, float]) -> Cloud:
    """One point a method that has a score and an error: its skill in its own models, as it was trained there.

    `size` is the panel's (width, height) in pixels.
    """
    points: list[Row] = []
    for attention in cells.axes.attention:
        part = [row for row in rows if row["task"] == task and row["method"] == attention and row["score"] is not None]
        skill = mean_of(part, "trained_skill")
        if skill is None:
            continue
        record: Row = {"method": attention, "family": part[0]["family"], "skill": skill}
        record |= {"error": mean_of(part, "trained_error"), "argument": part[0]["trained_argument"]}
        record |= {"score": part[0]["score_mean"], "low": part[0]["score_low"], "high": part[0]["score_high"]}
        points.append(record)
    tops = [float(point["high"]) for point in points] or [1.0]
    bottoms = [float(point["low"]) for point in points] or [0.0]
    margin = 0.06 * (max(tops) - min(bottoms)) or 0.1
    scores = (min(bottoms) - margin, max(tops) + margin)
    skills = (-0.02, 1.15 * max([1.0, *(float(point["skill"]) for point in points)]))
    return Cloud([point | {"label_y": at} for point, at in _placed(points, skills, scores, size)], skills, scores)


def _placed(
    points: Sequence[Row], skills: tuple[float, float], scores: tuple[float, float], size: tuple[float, float]
) -> Iterator[tuple[Row, float]]:
    """Every point with the score at whose height its name stands, in a panel of `size` (width, height) pixels."""
    left, right = (_warp(bound) for bound in skills)
    across, down = size[0] / (right - left), size[1] / (scores[1] - scores[0])
    pixels = [
        (str(p["method"]), across * (_warp(float(p["skill"])) - left), down * (scores[1] - float(p["score"])))
        for p in points
    ]
    shifts = beside(pixels)
    for point in points:
        yield point, float(point["score"]) - shifts[str(point["method"])] / down


def _warp(skill: float) -> float:
    """Vega's symmetric logarithm."""
    return math.copysign(math.log1p(abs(skill) / SYMLOG), skill)


def heads(cells: Cells, task: str) -> tuple[list[Row], list[Row]]:
    """Error a layer and head on the reference models' Q, K, V at the headline budget, and methods without any."""
    measured: list[Row] = []
    absent: list[Row] = []
    for attention in cells.axes.attention:
        groups: dict[str, list[Row]] = {}
        for entry in headline_rows(cells.approximate[attention]["rows"], cells.headline):
            if entry["data"] == task and entry["source"] == "reference" and entry["error"] is not None:
                groups.setdefault(f"{entry['layer']}.{entry['head']}", []).append(entry)
        measured += [
            {"method": attention, "head": head, "error": mean_of(part, "error")}
            for head, part in sorted(groups.items())
        ]
        if not groups:
            reasons = {entry["data"]: entry["reason"] for entry in cells.approximate[attention]["not_applicable"]}
            absent.append({"method": attention, "reason": reasons.get(task)})
    return measured, absent
