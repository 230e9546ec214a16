"""The report of a study, from the files under a folder to the files under that folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from attnlens.files import atomic
from attnlens.report.cells import Cells
from attnlens.report.columns import COLUMNS, Row
from attnlens.report.methods import Method
from attnlens.report.table import join, summarize, write_summary, write_table


class Report(NamedTuple):
    """What was joined, and the images that were written."""

    cells: Cells
    rows: list[Row]
    images: list[Path]


def build_report(root: Path, cells: Cells, methods: Sequence[Method]) -> Report:
    """Write results/table.parquet, results/summary.json, results/figures/ and report/index.html under `root`.

    Raises:
        ValueError: a listed measurement is missing or out of date; the message names the command that makes it.
    """
    from attnlens.report.figures import figures, write_images
    from attnlens.report.page import write_page

    rows = join(cells)
    specs = figures(cells, rows)
    write_table(root / "results/table.parquet", rows)
    write_summary(root / "results/summary.json", cells, rows)
    with atomic(root / "results/figures") as aside:
        names = [path.name for path in write_images(aside, specs)]
    write_page(root / "report/index.html", cells, rows, methods, specs)
    return Report(cells, rows, [root / "results/figures" / name for name in names])


def track(report: Report, root: Path, logger: Mapping[str, object] | None = None) -> None:
    """Log the joined table, the figures and the page as one run of the study."""
    from attnlens import tracking

    cells = report.cells
    axes = {name: list(value) if isinstance(value, tuple) else value for name, value in cells.axes._asdict().items()}
    folder = root / "outputs" / "report"
    with tracking.run(
        job_type="report", name="report", group=cells.study, config=axes, folder=folder, logger=logger
    ) as run:
        names = [column.name for column in COLUMNS]
        run.table("table", names, [[row[name] for name in names] for row in report.rows])
        for image in report.images:
            run.figure(image.stem, image)
        run.summary(_flat(summarize(cells, report.rows)))
        run.artifact("report", "report", [root / "report/index.html", root / "results/table.parquet"])


def _flat(summary: Mapping[str, Mapping[str, Mapping[str, object]]]) -> dict[str, float]:
    return {
        f"{task}/{attention}/{name}": value
        for task, methods in summary.items()
        for attention, values in methods.items()
        for name, value in values.items()
        if isinstance(value, float)
    }
