"""The figure of operators in place of exact attention: one layer at a time, and more and more layers.

python -m attnlens.report.substitution results/substitute docs/figures/substitution.png
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from attnlens.files import atomic, read_json
from attnlens.report.columns import Row
from attnlens.report.labels import LINE_PIXELS, spread
from attnlens.report.palette import FAINT
from attnlens.report.style import Style, legend, panel_title, tip

WIDTH, HEIGHT = 400.0, 260.0
# Perplexities beyond this multiple of the model's own tell nothing but that nothing is left; they stand at the edge.
HOPELESS = 100.0
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
    logarithmic: bool


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
    exact, metric = float(served[0]["exact"]), str(served[0]["metric"])
    logarithmic = metric == "perplexity"
    points: list[Row] = [
        {"method": result["attention"], "family": result["family"], "state": row["state"]}
        | {"at": row[axis], "value": row["value"], "exact": result["exact"]}
        | {"drawn": min(row["value"], HOPELESS * exact) if logarithmic else row["value"]}
        for result in served
        for row in result[rows]
    ]
    of, back = (math.log, math.exp) if logarithmic else (float, float)
    values = [of(float(point["drawn"])) for point in points] + [of(exact)]
    pad = 0.05 * (max(values) - min(values) or 1.0)
    low, high = min(values) - pad, max(values) + pad
    scale = HEIGHT / (high - low)
    # Where two states of a method end at one place, one name says it.
    named = {str(point["method"]): point for point in points if point["state"] == "as is"}
    wanted = {name: scale * (of(float(point["drawn"])) - low) for name, point in named.items()}
    placed = spread(wanted, LINE_PIXELS, HEIGHT)
    labels = [point | {"label_at": back(low + placed[name] / scale)} for name, point in named.items()]
    return Panel(subject, metric, title, points, labels, exact, (back(low), back(high)), logarithmic)


def substitution_figure(results: Mapping[tuple[str, str], Mapping], style: Style) -> alt.ConcatChart:
    """The metric of the model against the layer replaced, and against the number of them; gray: exact attention."""
    return alt.concat(*(_chart(panel, style) for panel in panels(results)), columns=2)


def _chart(panel: Panel, style: Style) -> alt.LayerChart | alt.FacetChart:
    at = sorted({int(point["at"]) for point in panel.points})
    at = at if len(at) <= 12 else at[::5]
    x = alt.X("at:Q", title=panel.title, axis=alt.Axis(values=at, format="d"))
    kind: dict[str, Any] = {"type": "log"} if panel.logarithmic else {"zero": False}
    bounds = alt.Scale(domain=list(panel.domain), nice=False, **kind)
    y = alt.Y("drawn:Q", title=panel.metric.replace("_", " "), scale=bounds, axis=alt.Axis(format="~g"))
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
        .encode(y=alt.Y("exact:Q", scale=bounds), tooltip=[tip("exact")]),
        base.mark_line(strokeWidth=1.6).encode(detail="method:N", strokeDash=dash),
        base.mark_point(size=35, filled=True).encode(shape=style.method(), stroke=style.method_stroke(), tooltip=tips),
        labels.mark_rule(strokeWidth=0.7).encode(x=x, y=y, x2=alt.value(WIDTH + 6), y2="label_at:Q"),
        labels.mark_text(align="left", fontSize=11).encode(x=alt.value(WIDTH + 9), y="label_at:Q", text="method:N"),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=panel_title(panel.subject))


def write_figure(path: Path, results: Mapping[tuple[str, str], Mapping], scale: int = 2) -> None:
    """Draw as PNG, `scale` pixels a point.

    Raises:
        ValueError: there is nothing to draw.
    """
    import vl_convert

    if not panels(results):
        raise ValueError("`results` holds no substitution: run `python pipelines/substitute.py subject=smollm2 ...`")
    style = Style({name: str(result["family"]) for (_, name), result in results.items()})
    spec = style.specification(substitution_figure(results, style))
    with atomic(path) as aside:
        aside.write_bytes(vl_convert.vegalite_to_png(spec, scale=scale))


def main() -> None:
    """Read the folder of results, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results/substitute")
    parser.add_argument("figure", type=Path, help="a PNG to write")
    chosen = parser.parse_args()
    results: dict[tuple[str, str], Any] = {
        (path.parent.name, path.stem): read_json(path) for path in sorted(chosen.results.glob("*/*.json"))
    }
    write_figure(chosen.figure, results)


if __name__ == "__main__":
    main()
