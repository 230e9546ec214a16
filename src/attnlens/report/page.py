"""report/index.html: findings, figures, the joined table and what is needed to make them again, in one file.

The page asks no host for anything (its content policy forbids it), and equal inputs give equal bytes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from attnlens.files import atomic
from attnlens.report.cells import Cells
from attnlens.report.columns import COLUMNS, MEASURES, SOURCES, Column, Row
from attnlens.report.methods import Method
from attnlens.report.palette import colors
from attnlens.report.series import not_drawn
from attnlens.report.table import headline_rows, mean_of
from attnlens.report.verdicts import findings, share

DASH = "–"


def write_page(
    path: Path, cells: Cells, rows: Sequence[Row], methods: Sequence[Method], specs: Mapping[str, dict[str, Any]]
) -> None:
    """Write the page; `specs` are the Vega-Lite charts by name."""
    with atomic(path) as aside:
        aside.write_text(render(cells, rows, methods, specs), encoding="utf-8")


def render(cells: Cells, rows: Sequence[Row], methods: Sequence[Method], specs: Mapping[str, dict[str, Any]]) -> str:
    """The page as text."""
    import jinja2
    import vl_convert

    folder = files("attnlens.report")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    palette = colors([str(cells.approximate[attention]["family"]) for attention in cells.axes.attention])
    return template.render(
        style=_verbatim((folder / "page.css").read_text(encoding="utf-8")),
        script=_verbatim((folder / "page.js").read_text(encoding="utf-8")),
        library=_verbatim(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),
        specs=_verbatim(_json(specs)),
        study=cells.study,
        caches=bool(cells.cache["rows"]),
        subjects=cells.axes.subject if cells.substitute else (),
        budget=_budget(cells),
        refusals=[
            f"{name} in {subject}: {r['reason']}." for (subject, name), r in cells.substitute.items() if r["reason"]
        ],
        tasks=cells.axes.data,
        reference=cells.axes.reference,
        headline=share(cells.headline),
        facts=list(_facts(cells, rows)),
        findings=findings(cells, rows),
        undrawn=", ".join(not_drawn(cells, rows)),
        metrics={task: cells.meta[task]["metric"].replace("_", " ") for task in cells.axes.data},
        headlines=[_headline(cells, rows, attention, palette) for attention in cells.axes.attention],
        filters=_filters(cells, rows),
        columns=COLUMNS,
        groups=list(_groups()),
        classes={column.name: _classes(column) for column in COLUMNS},
        records=[_record(row) for row in rows],
        methods=[{"method": method, "color": palette[method.family]} for method in methods],
        terms=list(_terms()),
        params=_params(cells),
        data=[_data(cells, task) for task in cells.axes.data],
    )


def _budget(cells: Cells) -> str:
    budgets = sorted({result["budget"] for result in cells.substitute.values()})
    return " or ".join(share(budget) for budget in budgets)


def _verbatim(text: str) -> Any:
    import markupsafe

    assert "</script" not in text, "an inlined script must not close its own element"
    return markupsafe.Markup(text)


def _json(value: object) -> str:
    # Inside a script element `<` may only stand escaped; JSON has an escape of its own for it.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _facts(cells: Cells, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    yield "Methods", ", ".join(cells.axes.attention)
    for task in cells.axes.data:
        meta = cells.meta[task]
        direction = "bidirectional" if not meta["causal"] else "causal"
        objective = meta["objective"].replace("_", " ")
        yield (
            f"Task {task}",
            f"{objective}, {direction}, {meta['length']} tokens, scored in {meta['metric'].replace('_', ' ')}",
        )
    yield "Seeds", f"{len(cells.seeds)} a cell ({', '.join(map(str, cells.seeds))})"
    yield "Budgets", f"{', '.join(share(b) for b in cells.axes.budgets)} of exact attention's counted FLOPs"
    yield "Reference", f"Q, K, V of the models trained with {cells.axes.reference}, beside each method's own"
    yield "Rows", f"{len(rows)}, of which {sum(row['status'] != 'ok' for row in rows)} not applicable or unreachable"


def _headline(cells: Cells, rows: Sequence[Row], attention: str, palette: Mapping[str, str]) -> dict[str, object]:
    family = str(cells.approximate[attention]["family"])
    own = [row for row in rows if row["method"] == attention]
    parts = [[row for row in own if row["task"] == task] for task in cells.axes.data]
    cell = [_headline_cell(cells, part) for part in parts]
    return {"method": attention, "family": family, "color": palette[family], "cells": cell}


def _headline_cell(cells: Cells, part: Sequence[Row]) -> dict[str, object]:
    first = part[0]
    if first["score"] is None:
        return {"reason": first["reason"]}
    picked = headline_rows(part, cells.headline)
    error = mean_of(picked, "reference_error")
    star = "" if all(row["status"] == "ok" for row in picked) else "*"
    interval = f"[{first['score_low']:.3f}, {first['score_high']:.3f}]" if first["score_low"] is not None else DASH
    text = DASH if error is None else f"{number(error)}{star}"
    return {"reason": None, "score": f"{first['score_mean']:.3f}", "interval": interval, "error": text}


def number(value: int | float) -> str:
    """Three significant digits in a column that lines up: 0.0123, 1.20, 66,560, 3.1e-07; whole numbers stay whole."""
    if value == int(value) and abs(value) < 1e12:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 100:
        return f"{value:#.3g}"
    return f"{value:,.0f}" if 1e2 <= abs(value) < 1e12 else f"{value:.1e}"


def _filters(cells: Cells, rows: Sequence[Row]) -> dict[str, list[str]]:
    families = dict.fromkeys(str(row["family"]) for row in rows)
    budgets = [*map(share, cells.axes.budgets), "none"]
    return {"family": list(families), "task": list(cells.axes.data), "budget": budgets}


def _groups() -> Iterator[dict[str, object]]:
    for name, members in groupby(COLUMNS, key=lambda column: column.group):
        columns = list(members)
        yield {"name": name, "all": len(columns), "core": sum(column.core for column in columns)}


_STARTS = {next(members).name for _, members in groupby(COLUMNS, key=lambda column: column.group)} - {COLUMNS[0].name}


def _classes(column: Column) -> str:
    marks = {
        "number": column.kind in ("number", "integer"),
        "further": not column.core,
        "start": column.name in _STARTS,
        "method": column is COLUMNS[0],
    }
    return "".join(f" {name}" for name, holds in marks.items() if holds)


def _record(row: Row) -> dict[str, object]:
    budget = "none" if row["budget"] is None else share(float(row["budget"]))
    return {key: row[key] for key in ("family", "task")} | {
        "budget": budget,
        "cells": [_cell(column, row) for column in COLUMNS],
    }


def _cell(column: Column, row: Row) -> Row:
    value = row[column.name]
    first = column is COLUMNS[0]
    cell: Row = {"tag": "th" if first else "td", "scope": first, "value": None, "title": None}
    classes = _classes(column).replace(" method", "")
    if value is None:
        text, title = ("", None) if column.name == "reason" else (DASH, _reason(column, row))
        return cell | {"text": text, "title": title, "classes": f"{classes} missing".strip()}
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    text = _shown(column, value)
    return cell | {"text": text, "value": repr(value) if numeric else None, "classes": classes.strip()}


def _shown(column: Column, value: str | int | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value.replace("_", " ") if column.name == "metric" else value
    if column.name == "budget":
        return share(value)
    return f"{value:.3f}" if column.name.startswith("score") else number(value)


def _reason(column: Column, row: Row) -> str:
    if row["reason"]:
        return str(row["reason"])
    if column.name in ("budget", "argument", "trained_argument"):
        return f"{row['method']} has no budget to choose"
    return "has no meaning here, or is below rounding"


def _terms() -> Iterator[tuple[str, str]]:
    measures = {f"{source}_{measure.name}" for source in SOURCES for measure in MEASURES}
    for column in COLUMNS:
        if column.name not in measures:
            yield (
                (column.label if column.group in ("cell", "note") else f"{column.label} ({column.group})"),
                column.help,
            )
    for measure in MEASURES:
        yield f"{measure.label} (own, reference)", measure.help


def _params(cells: Cells) -> str:
    axes = cells.axes._asdict()
    return "\n".join(f"{name}: {_plain(value)}" for name, value in axes.items())


def _plain(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _data(cells: Cells, task: str) -> dict[str, object]:
    meta = cells.meta[task]
    hashes = meta.get("files") or {}
    return {
        "name": task,
        "objective": meta["objective"].replace("_", " "),
        "causal": "yes" if meta["causal"] else "no",
        "length": meta["length"],
        "vocabulary": meta["vocabulary_size"],
        "sources": list(_flat(meta.get("sources") or {})),
        "files": "\n".join(f"{digest}  {name}" for name, digest in sorted(hashes.items())),
        "config": cells.configs[task].rstrip("\n"),
    }


def _flat(value: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in sorted(value.items()):
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(entry)
