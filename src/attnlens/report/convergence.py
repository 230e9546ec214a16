"""The figure of error against a method's own budget: the kernel estimate where it has an order, then the outputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import altair as alt

from attnlens.report.columns import Row
from attnlens.report.labels import LINE_PIXELS, spread
from attnlens.report.palette import FAINT
from attnlens.report.series import EXACT, decades
from attnlens.report.style import Style, panel_title, tip

WIDTH, HEIGHT = 400.0, 310.0
# Errors beyond tell nothing but that there is no information; they stand at the edge.
CEILING = 30.0


@dataclass(frozen=True)
class Panel:
    """One panel: points of methods, the errors of mean(V) by target, end labels, the vertical domain."""

    title: str
    points: list[Row]
    nulls: list[Row]
    labels: list[Row]
    domain: tuple[float, float]


def panels(results: Mapping[str, Mapping], height: float = HEIGHT) -> list[Panel]:
    """Kernel estimates at the smallest logit scale, then outputs at every scale; empty panels are left out."""
    measured = {name: result for name, result in results.items() if result["points"]}
    scales = sorted({point["logit_scale"] for result in measured.values() for point in result["points"]})
    found = [_panel(measured, scales[0], "kernel_error", height)] if scales else []
    found += [_panel(measured, scale, "error", height) for scale in scales]
    return [panel for panel in found if panel.points]


def _panel(measured: Mapping[str, Mapping], scale: float, field: str, height: float) -> Panel:
    points: list[Row] = []
    nulls: dict[str, Row] = {}
    for method, result in measured.items():
        for point in result["points"]:
            error = point[field]
            if point["logit_scale"] != scale or error is None or error < EXACT:
                continue
            named = {"method": method, "family": result["family"], "argument": point["argument"], "error": error}
            points.append(named | {"achieved": point["achieved"], "budget": result["budget"]})
        for null in result["null"] if field == "error" else ():
            # Operators that are their own target have each another mean(V).
            target = method if result["target"] == "itself" else result["target"]
            if null["logit_scale"] == scale and null["error"] is not None:
                nulls[target] = {"target": target, "error": null["error"]}
    errors = [min(float(r["error"]), CEILING) for r in (*points, *nulls.values())] or [0.1, 1.0]
    domain = min(errors) / 1.25, max(errors) * 1.25
    what = "kernel estimate" if field == "kernel_error" else "output"
    labels = _labels(measured, points, domain, height, with_slope=field == "kernel_error")
    return Panel(f"{what}, logit scale {scale:g}", points, list(nulls.values()), labels, domain)


def _labels(
    measured: Mapping[str, Mapping],
    points: Sequence[Row],
    domain: tuple[float, float],
    height: float,
    *,
    with_slope: bool,
) -> list[Row]:
    """The last point of every method, the height of its name, and beside it slope and declared order."""
    low, high = domain
    last = {str(point["method"]): point for point in points}
    scale = height / math.log(high / low)
    wanted = {name: scale * math.log(max(low, min(float(r["error"]), high)) / low) for name, r in last.items()}
    placed = spread(wanted, LINE_PIXELS, height)
    labels = []
    for name, record in last.items():
        text, fit, order = name, measured[name]["slope"], measured[name]["order"]
        if with_slope and fit is not None:
            text += f" {fit['slope']:.2f}" + ("" if order is None else f" (-{order:g})")
        labels.append(record | {"text": text, "label_at": low * math.exp(placed[name] / scale)})
    return labels


def convergence_figure(results: Mapping[str, Mapping], style: Style) -> alt.ConcatChart:
    """Relative error against the budget argument, both logarithmic; gray: mean(V) of softmax and of other targets."""
    return alt.concat(*(_chart(panel, style) for panel in panels(results)), columns=2)


def _chart(panel: Panel, style: Style) -> alt.LayerChart | alt.FacetChart:
    arguments = sorted({int(point["argument"]) for point in panel.points})
    x = alt.X(
        "argument:Q",
        title="budget (features, landmarks, keys: the method's own)",
        scale=alt.Scale(type="log", domain=[arguments[0] / 1.15, arguments[-1] * 1.15], nice=False),
        axis=alt.Axis(values=arguments, format="d"),
    )
    y = alt.Y(
        "error:Q",
        title="relative error (root mean square over draws)",
        scale=alt.Scale(type="log", domain=list(panel.domain), clamp=True, nice=False),
        axis=alt.Axis(values=decades(*panel.domain), format="~g"),
    )
    tips = [tip("method", "N"), tip("budget", "N"), *map(tip, ("argument", "error", "achieved"))]
    base = style.chart(f"{panel.title} methods", panel.points).encode(x=x, y=y, color=style.family())
    labels = style.chart(f"{panel.title} labels", panel.labels).encode(color=style.family())
    layers = [
        style.chart(f"{panel.title} nulls", panel.nulls)
        .mark_rule(color=FAINT, strokeDash=[4, 3])
        .encode(y=y, tooltip=[tip("target", "N"), tip("error")]),
        base.mark_line(strokeWidth=2).encode(detail="method:N"),
        base.mark_point(size=50, filled=True, strokeWidth=1.6).encode(
            shape=style.method(), stroke=style.method_stroke(), tooltip=tips
        ),
        labels.mark_rule(strokeWidth=0.7).encode(x=x, y=y, x2=alt.value(WIDTH + 6), y2="label_at:Q"),
        labels.mark_text(align="left", fontSize=11).encode(x=alt.value(WIDTH + 9), y="label_at:Q", text="text:N"),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=panel_title(panel.title))
