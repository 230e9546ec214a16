"""The figures as Vega-Lite charts: on the page they are live SVG, in results/figures/ the same charts are PNG.

Every chart is a function of the joined table's rows; the panels of a chart are tasks, of `convergence` logit scales.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from attnlens.files import atomic
from attnlens.report.caches import cache_figure
from attnlens.report.cells import Cells
from attnlens.report.columns import Row
from attnlens.report.convergence import convergence_figure
from attnlens.report.palette import FAINT, FAMILY_COLORS, INK
from attnlens.report.series import (
    NULL,
    RANK,
    SYMLOG,
    TOP,
    Curve,
    accuracy_points,
    decades,
    heads,
    predictions,
    seed_points,
    tradeoff,
)
from attnlens.report.style import Style, legend, panel_title, pick, tip
from attnlens.report.substitution import substitution_figure
from attnlens.report.variance import variance_figure

# Altair's declared result of `layer(...).properties(...)`; here it is a LayerChart.
Panel = alt.LayerChart | alt.FacetChart
# Pixels: a panel, and a line of it that holds one name.
WIDTH, HEIGHT, ROW = 400.0, 310.0, 22.0
CONTEXT_DASHES = {NULL: [1, 0], RANK: [6, 3], TOP: [2, 2]}
CHOSEN = "datum.source == source"


def figures(cells: Cells, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The Vega-Lite specifications by name: accuracy, error, prediction, heads, convergence, variance, caches
    where a reference model is causal, and substitution where the study has subjects."""
    family_of = {attention: str(cells.approximate[attention]["family"]) for attention in cells.axes.attention}
    family_of |= {attention: str(result["family"]) for (_, attention), result in cells.substitute.items()}
    charts = {
        "accuracy": lambda style: accuracy_figure(cells, style),
        "error": lambda style: error_figure(cells, rows, style),
        "prediction": lambda style: prediction_figure(cells, rows, style),
        "heads": lambda style: heads_figure(cells, style),
        "convergence": lambda style: convergence_figure(cells.converge, style),
        "variance": lambda style: variance_figure(cells.variance, style),
    }
    if cells.cache["rows"]:
        charts["caches"] = lambda style: cache_figure(cells.cache, style)
    if cells.substitute:
        charts["substitution"] = lambda style: substitution_figure(cells.substitute, style)
    specs = {}
    for name, chart in charts.items():
        style = Style(family_of)
        specs[name] = style.specification(chart(style))
    return specs


def write_images(folder: Path, specs: Mapping[str, dict[str, Any]], scale: int = 2) -> list[Path]:
    """Write every chart as `folder`/<name>.png, `scale` pixels a point; equal charts give equal bytes."""
    import vl_convert

    written = []
    for name, spec in specs.items():
        path = folder / f"{name}.png"
        with atomic(path) as aside:
            aside.write_bytes(vl_convert.vegalite_to_png(spec, scale=scale))
        written.append(path)
    return written


def accuracy_figure(cells: Cells, style: Style) -> alt.ConcatChart:
    """Test score of every method with its confidence interval, best on top; baselines are rows and dashed rules."""
    return alt.concat(*(_accuracy_panel(cells, task, style) for task in cells.axes.data), columns=2)


def _accuracy_panel(cells: Cells, task: str, style: Style) -> Panel:
    meta = cells.meta[task]
    points = accuracy_points(cells, task)
    scored = [point for point in points if point["mean"] is not None]
    title = f"{meta['metric'].replace('_', ' ')} ({'higher' if meta['higher_is_better'] else 'lower'} is better)"
    y = alt.Y("label:N", sort=[point["label"] for point in points], title=None)
    x = alt.X("mean:Q", title=title, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=6))
    tips = [tip("method", "N"), tip("family", "N"), *(tip(name) for name in ("mean", "low", "high"))]
    base = style.chart(f"{task} methods", [p for p in scored if p["family"]]).encode(y=y, color=style.family())
    rules = style.chart(f"{task} baselines", [p for p in scored if not p["family"]]).encode(x=x)
    absent = style.chart(f"{task} absent", [p for p in points if p["mean"] is None])
    layers = [
        rules.mark_rule(color=FAINT, strokeDash=[3, 3], strokeWidth=0.8).encode(
            y=alt.value(0), y2=alt.value(ROW * len(scored))
        ),
        rules.mark_point(shape="stroke", color=FAINT, size=60, strokeWidth=2).encode(
            y=y, tooltip=[tip("label", "N"), tip("mean")]
        ),
        style.chart(f"{task} seeds", seed_points(points))
        .mark_tick(thickness=1.2, height=13)
        .encode(y=y, x="score:Q", color=style.family(), tooltip=[tip("method", "N"), tip("seed", "O"), tip("score")]),
        base.mark_rule(strokeWidth=2.5).encode(x=alt.X("low:Q"), x2="high:Q", tooltip=tips),
        base.transform_filter("datum.family != 'null'")
        .mark_point(size=60, filled=True, opacity=1)
        .encode(x=x, tooltip=tips),
        base.transform_filter("datum.family == 'null'")
        .mark_point(size=55, filled=True, fill="#ffffff", strokeWidth=1.8, opacity=1)
        .encode(x=x, tooltip=tips, stroke=alt.value(FAMILY_COLORS["null"])),
        absent.mark_text(align="left", color=FAINT, fontStyle="italic", fontSize=11).encode(
            y=y, x=alt.value(6), text=alt.value("not applicable"), tooltip=[tip("reason", "N")]
        ),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=ROW * len(points), title=panel_title(task))


def error_figure(cells: Cells, rows: Sequence[Row], style: Style) -> alt.ConcatChart:
    """Output error against achieved budget, both logarithmic, with the null and the oracles of equal cost."""
    source = alt.param(
        name="source",
        value="reference",
        bind=alt.binding_radio(
            options=["reference", "own"],
            labels=["the reference model", "each method's own model"],
            name="Queries, keys and values of ",
        ),
    )
    curves = {task: tradeoff(cells, rows, task, HEIGHT) for task in cells.axes.data}
    drawn = {record["method"] for curve in curves.values() for record in curve.methods}
    members = legend("method", [attention for attention in cells.axes.attention if attention in drawn])
    panels = [
        _error_panel(cells, task, curve, style, members, first=task == cells.axes.data[0])
        for task, curve in curves.items()
    ]
    return alt.concat(*panels, columns=2).add_params(source)


def _error_panel(cells: Cells, task: str, curve: Curve, style: Style, members: alt.Legend, *, first: bool) -> Panel:
    low, high = curve.span
    x = alt.X(
        "achieved:Q",
        title="achieved budget (share of exact attention's FLOPs)",
        scale=alt.Scale(type="log", domain=[low, high], clamp=True, nice=False),
        axis=alt.Axis(
            values=[x for x in (*cells.axes.budgets, 1.0, 2.0) if x < high],
            labelExpr="datum.value < 1 ? '1/' + round(1 / datum.value) : datum.value",
        ),
    )
    y = alt.Y(
        "error:Q",
        title="relative output error",
        scale=alt.Scale(type="log", domain=list(curve.domain), clamp=True, nice=False),
        axis=alt.Axis(values=decades(*curve.domain), format="~g"),
    )
    picks = [pick("family"), pick("method")]
    opacity = alt.when(picks[0] & picks[1]).then(alt.value(1)).otherwise(alt.value(0.08))
    tips = [
        tip("method", "N"),
        tip("family", "N"),
        *map(tip, ("budget", "achieved", "error", "error_min", "error_max")),
    ]
    base = style.chart(f"{task} methods", curve.methods).transform_filter(CHOSEN)
    points = base.mark_point(size=60, strokeWidth=1.6, filled=True).encode(
        x=x,
        y=y,
        color=style.family(),
        stroke=style.method_stroke(members),
        shape=style.method(members),
        opacity=opacity,
        tooltip=[*tips, tip("skill"), tip("argument", "N")],
    )
    layers = [
        _context_layer(task, curve, style, x, y),
        base.mark_line(strokeWidth=2).encode(x=x, y=y, color=style.family(), detail="method:N", opacity=opacity),
        # The legends are shared: selections hold for all panels and are declared in one of them.
        points.add_params(*picks) if first else points,
        *_end_labels(task, curve, style, opacity, x, y),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=panel_title(task))


def _context_layer(task: str, curve: Curve, style: Style, x: alt.X, y: alt.Y) -> alt.Chart:
    dash = alt.StrokeDash(
        "name:N",
        scale=alt.Scale(domain=list(CONTEXT_DASHES), range=list(CONTEXT_DASHES.values())),
        legend=legend("for comparison"),
    )
    base = style.chart(f"{task} context", curve.context).transform_filter(CHOSEN)
    tips = [tip("name", "N"), tip("achieved"), tip("error")]
    return base.mark_line(color=FAINT, strokeWidth=1.5).encode(x=x, y=y, strokeDash=dash, tooltip=tips)


def _end_labels(task: str, curve: Curve, style: Style, opacity: Any, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    base = (
        style.chart(f"{task} labels", curve.labels)
        .transform_filter(CHOSEN)
        .encode(color=style.family(), opacity=opacity)
    )
    end = base.mark_rule(strokeWidth=0.7).encode(x=x, y=y, x2=alt.value(WIDTH + 6), y2="label_at:Q")
    text = base.mark_text(align="left", fontSize=11).encode(x=alt.value(WIDTH + 9), y="label_at:Q", text="method:N")
    return [end, text]


def prediction_figure(cells: Cells, rows: Sequence[Row], style: Style) -> alt.ConcatChart:
    """Skill in the model itself, as trained, against its test score: one point a method, one panel a task."""
    panels = [_prediction_panel(cells, rows, task, style, first=task == cells.axes.data[0]) for task in cells.axes.data]
    return alt.concat(*panels, columns=2)


def _prediction_panel(cells: Cells, rows: Sequence[Row], task: str, style: Style, *, first: bool) -> Panel:
    meta = cells.meta[task]
    cloud = predictions(cells, rows, task, (WIDTH, HEIGHT))
    direction = "higher" if meta["higher_is_better"] else "lower"
    x = alt.X(
        "skill:Q",
        title="skill as trained (error / error of mean(V); lower is better)",
        scale=alt.Scale(type="symlog", constant=SYMLOG, domain=list(cloud.skills), nice=False),
        axis=alt.Axis(values=[0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], format="~g"),
    )
    title = f"{meta['metric'].replace('_', ' ')} ({direction} is better)"
    scale = alt.Scale(domain=list(cloud.scores), nice=False)
    y = alt.Y("score:Q", title=title, scale=scale)
    picked = pick("family")
    opacity = alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.1))
    one = style.chart("one", [{"one": 1}]).mark_rule(color=FAINT, strokeDash=[3, 3]).encode(x="one:Q")
    base = style.chart(f"{task} methods", cloud.points).encode(x=x, opacity=opacity)
    points = base.mark_point(size=70, strokeWidth=1.6, filled=True).encode(
        y=y,
        stroke=style.method_stroke(),
        color=style.family(),
        shape=style.method(),
        tooltip=[
            tip("method", "N"),
            tip("family", "N"),
            tip("skill"),
            tip("error"),
            tip("score"),
            tip("argument", "N"),
        ],
    )
    layers = [
        one,
        base.mark_rule(strokeWidth=1.2).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q", color=style.family()),
        points.add_params(picked) if first else points,
        style.chart(f"{task} methods", cloud.points)
        .mark_text(align="left", baseline="middle", dx=9, fontSize=11)
        .encode(x=x, y=alt.Y("label_y:Q", scale=scale), text="method:N", color=style.family(), opacity=opacity),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=panel_title(task))


def heads_figure(cells: Cells, style: Style) -> alt.ConcatChart:
    """Error of every layer and head of the reference models at the headline budget, one row a method."""
    return alt.concat(*(_heads_panel(cells, task, style) for task in cells.axes.data), columns=2)


def _heads_panel(cells: Cells, task: str, style: Style) -> Panel:
    measured, absent = heads(cells, task)
    y = alt.Y("method:N", sort=list(cells.axes.attention), title=None)
    base = style.chart(f"{task} measured", measured).encode(
        x=alt.X("head:N", title="layer.head", axis=alt.Axis(labelAngle=0)),
        y=y,
        tooltip=[tip("method", "N"), tip("error")],
    )
    scale = alt.Scale(scheme="blues", domain=[0, 1.2], clamp=True)
    shade = alt.Color("error:Q", scale=scale, legend=alt.Legend(title="error", gradientLength=120))
    ink = alt.when("datum.error > 0.7").then(alt.value("#ffffff")).otherwise(alt.value(INK))
    layers = [
        base.mark_rect(stroke="#ffffff").encode(color=shade),
        base.mark_text(fontSize=10).encode(text=alt.Text("error:Q", format=".2f"), color=ink),
        style.chart(f"{task} absent", absent)
        .mark_text(align="left", color=FAINT, fontStyle="italic", fontSize=10)
        .encode(y=y, x=alt.value(6), text=alt.value("not applicable"), tooltip=[tip("reason", "N")]),
    ]
    return alt.layer(*layers).properties(width=WIDTH, title=panel_title(task))
