"""The figure of what a pretrained model loses by each conversion: its score against what is kept.

python -m attnlens.report.conversions results/convert docs/figures/conversions.png
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import altair as alt

from attnlens.files import atomic, read_json
from attnlens.report.columns import Row
from attnlens.report.palette import FAINT
from attnlens.report.style import Style, legend, panel_title, tip

WIDTH, HEIGHT = 400.0, 310.0
COLORS = {
    "mean_pooling": "#000000",
    "joint_svd": "#0072b2",
    "joint_svd, weights": "#56b4e9",
    "transmla": "#d55e00",
    "collaborative": "#009e73",
    "extreme 1": "#cc79a7",
    "extreme 2": "#8a5fb0",
    "extreme 3": "#8a8a8a",
    "trawl cp": "#e69f00",
    "trawl tucker": "#b59a00",
}
# Scores beyond this multiple of the model's own tell nothing but that nothing is left; they stand at the edge.
HOPELESS = 50.0


def points(result: Mapping) -> list[Row]:
    """One point a setting; TransMLA's folds are lines of their own."""
    worst = result["value"] * HOPELESS
    return [
        {
            **row,
            "line": row["conversion"] + (row["setting"].partition(", ")[2] if row["conversion"] == "transmla" else ""),
        }
        | {"drawn": min(row["value"], worst) if result["metric"] == "perplexity" else row["value"]}
        for row in result["rows"]
    ]


def conversion_figure(results: Sequence[Mapping], style: Style) -> alt.ConcatChart:
    """A panel a model: perplexity on a logarithmic axis, cosine on a linear one; dashed: the model itself."""
    return alt.concat(*(_panel(result, style) for result in results), columns=2)


def _panel(result: Mapping, style: Style) -> alt.LayerChart | alt.FacetChart:
    perplexity = result["metric"] == "perplexity"
    what = "parameters"
    x = alt.X(f"{what}:Q", title="weights kept, of those replaced", scale=alt.Scale(zero=False))
    title = "perplexity (lower is better)" if perplexity else "cosine to the model's own embeddings (higher is better)"
    scale = alt.Scale(type="log", nice=False) if perplexity else alt.Scale(zero=False)
    y = alt.Y("drawn:Q", title=title, scale=scale, axis=alt.Axis(format="~g"))
    color = alt.Color(
        "conversion:N", scale=alt.Scale(domain=list(COLORS), range=list(COLORS.values())), legend=legend("conversion")
    )
    tips = [tip("conversion", "N"), tip("setting", "N"), *map(tip, ("value", "parameters", "cache"))]
    base = style.chart(f"{result['model']} conversions", points(result)).encode(x=x, y=y, color=color)
    layers = [
        style.chart(f"{result['model']} itself", [{"itself": result["value"] if perplexity else 1.0}])
        .mark_rule(color=FAINT, strokeDash=[4, 3])
        .encode(y="itself:Q", tooltip=[tip("itself")]),
        base.mark_line(strokeWidth=1.4).encode(detail="line:N", order=f"{what}:Q"),
        base.mark_point(size=45, filled=True).encode(tooltip=tips),
    ]
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=panel_title(result["model"]))


def write_figure(path: Path, results: Sequence[Mapping], scale: int = 2) -> None:
    """Draw as PNG, `scale` pixels a point.

    Raises:
        ValueError: there is nothing to draw.
    """
    import vl_convert

    if not results:
        raise ValueError("`results` is empty: run `python pipelines/convert.py pretrained=smollm2`")
    style = Style({})
    spec = style.specification(conversion_figure(results, style))
    with atomic(path) as aside:
        aside.write_bytes(vl_convert.vegalite_to_png(spec, scale=scale))


def main() -> None:
    """Read the folder of results, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results/convert")
    parser.add_argument("figure", type=Path, help="a PNG to write")
    chosen = parser.parse_args()
    write_figure(chosen.figure, [cast(Mapping, read_json(path)) for path in sorted(chosen.results.glob("*.json"))])


if __name__ == "__main__":
    main()
