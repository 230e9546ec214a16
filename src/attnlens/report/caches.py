"""The figure of what compressed caches cost: error of decoded outputs against the bytes of the state.

python -m attnlens.report.caches results/cache.json docs/figures/caches.png
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import cast

import altair as alt

from attnlens.files import atomic, read_json
from attnlens.report.columns import Row
from attnlens.report.palette import FAINT
from attnlens.report.series import decades
from attnlens.report.style import Style, legend, panel_title, tip

WIDTH, HEIGHT = 400.0, 310.0
COLORS = {
    "full": "#000000",
    "sliding": "#e69f00",
    "heavy_hitters": "#0072b2",
    "snapkv": "#009e73",
    "oracle": "#8a8a8a",
}
SHAPES = {"full precision": "circle", "8 bits": "square", "4 bits": "triangle-up", "2 bits": "diamond"}
# Errors below are round-off: keeping everything has no place on a logarithmic axis.
EXACT = 1e-5


def points(rows: Sequence[Mapping]) -> dict[str, list[Row]]:
    """Of every source, one point a policy, budget and store: means over heads, layers and seeds, bytes a fraction of
    those of the whole cache in full precision."""
    kept: dict[tuple, list[Mapping]] = {}
    for row in rows:
        kept.setdefault((row["source"], row["policy"], row["budget"], row["bits"]), []).append(row)
    whole = {
        source: sum(row["bytes"] for row in of)
        for (source, policy, _, bits), of in kept.items()
        if policy == "full" and bits is None
    }
    found: dict[str, list[Row]] = {}
    for (source, policy, budget, bits), of in kept.items():
        means = {name: fmean(x for row in of for x in row[name]) for name in ("error", "skill", "null")}
        store = "full precision" if bits is None else f"{bits} bits"
        point = {"policy": policy, "store": store, "line": f"{policy} {store}", "budget": budget or of[0]["tokens"]}
        found.setdefault(source, []).append(point | means | {"bytes": sum(row["bytes"] for row in of) / whole[source]})
    return found


def cache_figure(result: Mapping, style: Style) -> alt.ConcatChart:
    """A panel a source, both axes logarithmic; lines join the budgets of a policy and store, dashed: mean(V)."""
    return alt.concat(*(_panel(source, rows, style) for source, rows in points(result["rows"]).items()), columns=2)


def _panel(source: str, rows: list[Row], style: Style) -> alt.LayerChart | alt.FacetChart:
    drawn = [row for row in rows if float(row["error"]) > EXACT]
    errors, sizes = ([float(row[name]) for row in drawn] for name in ("error", "bytes"))
    null = float(rows[0]["null"])
    domain = min(errors) / 1.25, max(*errors, null) * 1.25
    span = [min(sizes) / 1.15, max(sizes) * 1.15]
    ticks = [tick for tick in (0.03, 0.06, 0.125, 0.25, 0.5, 1, 2) if span[0] <= tick <= span[1]]
    x = alt.X(
        "bytes:Q",
        title="bytes of the state, of those of all in float32",
        scale=alt.Scale(type="log", domain=span, nice=False),
        axis=alt.Axis(values=ticks, format="~g"),
    )
    y = alt.Y(
        "error:Q",
        title="relative error of decoded outputs (mean over heads)",
        scale=alt.Scale(type="log", domain=list(domain), nice=False),
        axis=alt.Axis(values=decades(*domain), format="~g"),
    )
    color = alt.Color(
        "policy:N", scale=alt.Scale(domain=list(COLORS), range=list(COLORS.values())), legend=legend("policy")
    )
    shape = alt.Shape(
        "store:N", scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values())), legend=legend("store")
    )
    tips = [tip("policy", "N"), tip("store", "N"), *map(tip, ("budget", "bytes", "error", "skill"))]
    base = style.chart(f"{source} caches", drawn).encode(x=x, y=y, color=color)
    layers = [
        style.chart(f"{source} null", [{"error": null, "name": "mean(V)"}])
        .mark_rule(color=FAINT, strokeDash=[4, 3])
        .encode(y=y, tooltip=[tip("name", "N"), tip("error")]),
        base.mark_line(strokeWidth=1.2).encode(detail="line:N", order="budget:Q"),
        base.mark_point(size=45, filled=True).encode(shape=shape, tooltip=tips),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=panel_title(source))


def write_figure(path: Path, result: Mapping, scale: int = 2) -> None:
    """Draw as PNG, `scale` pixels a point.

    Raises:
        ValueError: there is nothing to draw.
    """
    import vl_convert

    if not result["rows"]:
        raise ValueError(f"`result` has no rows ({result['reason']}): measure a causal model, or name a `capture`")
    style = Style({})
    spec = style.specification(cache_figure(result, style))
    with atomic(path) as aside:
        aside.write_bytes(vl_convert.vegalite_to_png(spec, scale=scale))


def main() -> None:
    """Read the one, write the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="results/cache.json")
    parser.add_argument("figure", type=Path, help="a PNG to write")
    chosen = parser.parse_args()
    write_figure(chosen.figure, cast(Mapping, read_json(chosen.result)))


if __name__ == "__main__":
    main()
