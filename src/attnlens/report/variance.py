"""The figure of the relative variance of random features against the scale of the logits."""

from collections.abc import Mapping

import altair as alt

from attnlens.report.columns import Row
from attnlens.report.labels import LINE_PIXELS, spread
from attnlens.report.palette import FAINT
from attnlens.report.style import Style, panel_title, tip

WIDTH, HEIGHT = 400.0, 310.0
COLORS = {"positive": "#d55e00", "hyperbolic": "#e69f00", "trigonometric": "#0072b2", "favor_sharp": "#009e73"}
# Powers of ten of the features at which a weight is known to within itself; what lies above stands at the edge.
DRAWN = (-2.0, 24.0)


def curves(result: Mapping) -> tuple[list[Row], list[Row], list[Row]]:
    """Points of the Gaussian ladder, of the trained heads, and labels at the ends of the curves."""
    ladder = [
        {"features": kind, "logit_scale": row["logit_scale"], "variance": row[kind]}
        for row in result["gaussian"]
        for kind in COLORS
    ]
    heads = [
        {"features": kind, "logit_scale": row["logit_scale"], "variance": row[kind]}
        | {"head": f"{row['data']}, seed {row['seed']}, {row['layer']}.{row['head']}"}
        for row in result["reference"]
        for kind in COLORS
    ]
    last = {str(row["features"]): row for row in ladder}
    per_unit = HEIGHT / (DRAWN[1] - DRAWN[0])
    wanted = {kind: per_unit * (min(float(row["variance"]), DRAWN[1]) - DRAWN[0]) for kind, row in last.items()}
    placed = spread(wanted, LINE_PIXELS, HEIGHT)
    labels = [row | {"label_at": DRAWN[0] + placed[kind] / per_unit} for kind, row in last.items()]
    return ladder, heads, labels


def variance_figure(result: Mapping, style: Style) -> alt.ConcatChart:
    """Median over pairs of the relative variance of one feature: Gaussian ladders as lines, trained heads as points."""
    ladder, heads, labels = curves(result)
    scales = [row["logit_scale"] for row in result["gaussian"]]
    x = alt.X(
        "logit_scale:Q",
        title="standard deviation of the logits",
        scale=alt.Scale(type="log", domain=[min(scales), max(scales)], clamp=True, nice=False),
        axis=alt.Axis(values=scales, format="~g"),
    )
    y = alt.Y(
        "variance:Q",
        title="relative variance of one feature, power of ten",
        scale=alt.Scale(domain=list(DRAWN), clamp=True, nice=False),
    )
    color = alt.Color("features:N", scale=alt.Scale(domain=list(COLORS), range=list(COLORS.values())), legend=None)
    tips = [tip("features", "N"), tip("logit_scale"), tip("variance")]
    lines = style.chart("variance ladder", ladder).encode(x=x, y=y, color=color)
    ends = style.chart("variance labels", labels).encode(color=color)
    layers = [
        style.chart("variance one", [{"features": "1000 features", "at": 3.0}])
        .mark_rule(color=FAINT, strokeDash=[4, 3])
        .encode(y="at:Q", tooltip=[tip("features", "N")]),
        lines.mark_line(strokeWidth=2),
        lines.mark_point(size=40, filled=True).encode(tooltip=tips),
        style.chart("variance heads", heads)
        .mark_point(size=40, filled=False, strokeWidth=1.3, opacity=0.8)
        .encode(x=x, y=y, color=color, tooltip=[*tips, tip("head", "N")]),
        ends.mark_rule(strokeWidth=0.7).encode(x=x, y=y, x2=alt.value(WIDTH + 6), y2="label_at:Q"),
        ends.mark_text(align="left", fontSize=11).encode(x=alt.value(WIDTH + 9), y="label_at:Q", text="features:N"),
    ]
    chart = alt.layer(*layers).properties(
        width=WIDTH,
        height=HEIGHT,
        title=panel_title(f"d = {result['head_dim']}, and the heads of the reference models"),
    )
    return alt.concat(chart, columns=1)
