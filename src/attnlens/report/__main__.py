"""Print where the report is and its headline numbers, from what the stages left on disk.

python -m attnlens.report
"""

from pathlib import Path

from attnlens.report.cells import read_cells
from attnlens.report.console import console
from attnlens.report.table import join


def main() -> None:
    """Read, join, print."""
    cells = read_cells(Path.cwd())
    print(console(cells, join(cells)))
    print(f"\nreport: {Path('report/index.html').resolve()}")


if __name__ == "__main__":
    main()
