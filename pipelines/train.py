"""Stage train: one cell of the study, i.e. one attention operator on one data set, for all its seeds.

    python pipelines/train.py experiment=mqar attention=softmax seeds=2 out=models/softmax/mqar
    python pipelines/train.py -m experiment=mqar attention=nystromformer,performer seed=0,1,2 hydra/launcher=joblib

Paths are relative to the folder the command runs in. A killed run goes on where it was when it is started again.
"""

import sys
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from attnlens.training.cell import train_cell
from attnlens.training.job import Job


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> None:
    """Train the seeds of the cell that `data=` and `attention=` name and write its folder."""
    run = HydraConfig.get().runtime
    resolved = cast(dict, OmegaConf.to_container(config, resolve=True))
    seeds = range(config.seed, config.seed + config.seeds)
    names = {"data": run.choices["data"], "attention": run.choices["attention"], "folder": run.output_dir}
    jobs = [Job(config=resolved, seed=seed, **names) for seed in seeds]
    out = Path(config.out or Path(run.output_dir) / "cell")
    cell = train_cell(jobs, out, workers=config.workers)
    print(f"train {names['data']} {names['attention']}: {cell['status']}, in {out}", flush=True)


if __name__ == "__main__":
    main()
