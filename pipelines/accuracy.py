"""Turn the test scores of every trained cell into intervals, paired comparisons and verdicts.

    python pipelines/accuracy.py

Reads params.yaml, models/ and data/prepared/*/meta.json; writes results/accuracy.json.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="../conf", config_name="accuracy", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, compare, write; then log."""
    from attnlens.analysis.accuracy import accuracy
    from attnlens.files import write_json
    from attnlens.study import read_params

    root = Path.cwd()
    study = read_params(root / "params.yaml")
    options = {name: cfg.analysis[name] for name in ("confidence", "margin", "resamples", "seed")}
    rows = accuracy(study, root, **options)
    write_json(root / "results" / "accuracy.json", {"study": cfg.study, **options, "rows": rows})
    print(f"results/accuracy.json: {len(rows)} cells")

    from attnlens import tracking

    folder, columns = root / "outputs" / "accuracy", ["data", "attention", "metric", "mean", "low", "high", "verdict"]
    with tracking.run(
        job_type="accuracy", name="accuracy", group=cfg.study, config=options, folder=folder, logger=cfg.logger
    ) as run:
        run.table("accuracy", columns, [[row[column] for column in columns] for row in rows])
        run.summary({f"{row['data']}/{row['attention']}": row["mean"] for row in rows})
        run.artifact("accuracy", "results", [root / "results" / "accuracy.json"])


if __name__ == "__main__":
    main()
