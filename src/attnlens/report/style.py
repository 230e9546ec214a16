"""How every chart looks: scales of color and symbol, legends, tooltips, titles, axes."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from attnlens.report.palette import FAINT, GRID, INK, colors, symbols

FONT = "system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"


class Style:
    """The look that all figures of a study share, and the data of one of them.

    Charts refer to data by name: Altair copies what stands inside a chart every time that the chart is put in another.
    """

    def __init__(self, family_of: Mapping[str, str]) -> None:
        self.datasets: dict[str, list[dict]] = {}
        palette = colors(list(family_of.values()))
        marks = symbols(family_of)
        self.color = alt.Scale(domain=list(palette), range=list(palette.values()))
        self.member = alt.Scale(domain=list(family_of), range=[palette[family] for family in family_of.values()])
        self.shape = alt.Scale(domain=list(marks), range=list(marks.values()))

    def chart(self, name: str, records: Sequence[dict]) -> alt.Chart:
        """A chart of `records`, which all charts that give the same name share."""
        self.datasets[name] = list(records)
        return alt.Chart(alt.NamedData(name=name))

    def family(self) -> alt.Color:
        # The same legend on every layer: one layer that has none takes it from the others of its scale.
        return alt.Color("family:N", scale=self.color, legend=legend("family"))

    def method_stroke(self, legend: alt.Legend | None = None) -> alt.Stroke:
        return alt.Stroke("method:N", scale=self.member, legend=legend)

    def method(self, legend: alt.Legend | None = None) -> alt.Shape:
        return alt.Shape("method:N", scale=self.shape, legend=legend)

    def specification(self, chart: alt.ConcatChart) -> dict[str, Any]:
        """The finished chart as Vega-Lite."""
        spec = (
            chart.configure(font=FONT, background="#ffffff", padding=8)
            .configure_axis(
                gridColor=GRID,
                domainColor=FAINT,
                tickColor=FAINT,
                labelColor=INK,
                titleColor=INK,
                labelFontSize=11,
                titleFontSize=12,
                titleFontWeight="normal",
                titlePadding=9,
                labelLimit=200,
            )
            .configure_title(fontSize=13, fontWeight="bold", color=INK)
            .configure_legend(labelFontSize=11, titleFontSize=11, titleColor=FAINT, labelColor=INK, labelLimit=200)
            .configure_view(stroke=None)
            .configure_concat(spacing=70)
            .to_dict()
        )
        # Altair's schema does not know this setting of Vega: legends stand below each other, to fit a narrow page.
        spec["config"]["legend"]["layout"] = {"bottom": {"direction": "vertical", "anchor": "start", "margin": 8}}
        return spec | {"datasets": self.datasets}


def panel_title(task: str) -> alt.TitleParams:
    """The name of a task above its panel."""
    return alt.TitleParams(task, anchor="start", offset=10)


def legend(title: str, members: Sequence[str] | None = None) -> alt.Legend:
    """A legend below the chart; with `members`, of those alone and with hollow symbols."""
    look = alt.Legend(title=title, orient="bottom", symbolOpacity=1, columns=5)
    if members is not None:
        look.values, look.symbolFillColor = list(members), "#ffffff"
    return look


def pick(field: str) -> alt.Parameter:
    """A choice of values of `field`, made by clicks on its legend."""
    return alt.selection_point(name=f"{field}_pick", fields=[field], bind="legend")


def tip(name: str, kind: str = "Q") -> alt.Tooltip:
    """One line of a tooltip; `kind` is Vega-Lite's: Q for numbers, N for names."""
    title = name.replace("_", " ")
    if kind == "Q":
        return alt.Tooltip(f"{name}:Q", title=title, format=".3~g")
    return alt.Tooltip(f"{name}:{kind}", title=title)
