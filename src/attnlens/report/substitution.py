"""The figure of operators in place of exact attention: one layer at a time, and more and more layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import altair as alt

from attnlens.report.columns import Row
from attnlens.report.labels import LINE_PIXELS, spread
from attnlens.report.palette import FAINT
from attnlens.report.style import Style, legend, panel_title, tip

WIDTH, HEIGHT = 400.0, 260.0
DASHES = {"as is": [1, 0], "calibrated": [2, 2], "matched": [7, 3]}


@dataclass(frozen=True)
class Panel:
    """One panel: what stands on the horizontal axis, points of methods and states, labels of the last points."""

    subject: str
    metric: str
    title: str
    points: list[Row]
    labels: list[Row]
    exact: float
    domain: tuple[float, float]


def panels(results: Mapping[tuple[str, str], Mapping]) -> list[Panel]:
    """Two panels a subject, in the order of the results; operators that cannot serve a subject are left out."""
    found = []
    for subject in dict.fromkeys(subject for subject, _ in results):
        served = [result for (name, _), result in results.items() if name == subject and result["reason"] is None]
        if served:
            found.append(_panel(subject, served, "layers", "layer", "the layer that is replaced"))
            found.append(_panel(subject, served, "cumulative", "count", "layers replaced, the least sensitive first"))
    return found


def _panel(subject: str, served: Sequence[Mapping], rows: str, axis: str, title: str) -> Panel:
    points: list[Row] = [
        {"method": result["attention"], "family": result["family"], "state": row["state"]}
        | {"at": row[axis], "value": row["value"], "exact": result["exact"]}
        for result in served
        for row in result[rows]
    ]
    exact = float(served[0]["exact"])
    values = [float(point["value"]) for point in points] + [exact]
    pad = 0.05 * (max(values) - min(values) or 1.0)
    domain = min(values) - pad, max(values) + pad
    last = {f"{point['method']} {point['state']}": point for point in points}
    scale = HEIGHT / (domain[1] - domain[0])
    # Where two states of a method end at one place, one name says it.
    named = {name: point for name, point in last.items() if point["state"] == "as is"}
    placed = spread({name: scale * (float(p["value"]) - domain[0]) for name, p in named.items()}, LINE_PIXELS, HEIGHT)
    labels = [point | {"label_at": domain[0] + placed[name] / scale} for name, point in named.items()]
    return Panel(subject, str(served[0]["metric"]), title, points, labels, exact, domain)


def substitution_figure(results: Mapping[tuple[str, str], Mapping], style: Style) -> alt.ConcatChart:
    """The metric of the model against the layer replaced, and against the number of them; gray: exact attention."""
    return alt.concat(*(_chart(panel, style) for panel in panels(results)), columns=2)


def _chart(panel: Panel, style: Style) -> alt.LayerChart | alt.FacetChart:
    at = sorted({int(point["at"]) for point in panel.points})
    x = alt.X("at:Q", title=panel.title, axis=alt.Axis(values=at, format="d"))
    y = alt.Y("value:Q", title=panel.metric.replace("_", " "), scale=alt.Scale(domain=list(panel.domain), nice=False))
    dash = alt.StrokeDash(
        "state:N", scale=alt.Scale(domain=list(DASHES), range=list(DASHES.values())), legend=legend("the operator")
    )
    tips = [tip("method", "N"), tip("state", "N"), *map(tip, ("at", "value", "exact"))]
    name = f"{panel.subject} {panel.title}"
    base = style.chart(f"{name} methods", panel.points).encode(x=x, y=y, color=style.family())
    labels = style.chart(f"{name} labels", panel.labels).encode(color=style.family())
    layers = [
        style.chart(f"{name} exact", [{"exact": panel.exact}])
        .mark_rule(color=FAINT, strokeDash=[4, 3])
        .encode(y="exact:Q", tooltip=[tip("exact")]),
        base.mark_line(strokeWidth=1.6).encode(detail="method:N", strokeDash=dash),
        base.mark_point(size=35, filled=True).encode(shape=style.method(), stroke=style.method_stroke(), tooltip=tips),
        labels.mark_rule(strokeWidth=0.7).encode(x=x, y=y, x2=alt.value(WIDTH + 6), y2="label_at:Q"),
        labels.mark_text(align="left", fontSize=11).encode(x=alt.value(WIDTH + 9), y="label_at:Q", text="method:N"),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=panel_title(panel.subject))
