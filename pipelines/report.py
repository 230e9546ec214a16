"""Join every result of the study into results/table.parquet, results/figures/ and report/index.html.

    python pipelines/report.py

Reads params.yaml, data/prepared/*/meta.json, models/ and results/.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="../conf", config_name="report", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, join, write; then log; then print where the report is and its headline numbers."""
    from attnlens.report.build import build_report, track
    from attnlens.report.cells import read_cells
    from attnlens.report.console import console
    from attnlens.report.methods import methods_of

    root = Path.cwd()
    cells = read_cells(root)
    report = build_report(root, cells, methods_of(cells.approximate, cells.converge))
    track(report, root, cfg.logger)
    print(console(cells, report.rows))
    print("\nreport/index.html")


if __name__ == "__main__":
    main()
