"""Stage prepare: one data set of conf/data becomes data/prepared/<name>, three Arrow folders and a meta.json.

python pipelines/prepare.py data=mqar
"""

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from attnlens.construct import construct
from attnlens.data.store import save


@hydra.main(version_base="1.3", config_path="../conf", config_name="prepare")
def main(config: DictConfig) -> None:
    """Build the data set that `data=` names and save it; paths are relative to the folder the command runs in."""
    name = HydraConfig.get().runtime.choices["data"]
    print(f"prepare {name}: building", flush=True)
    data: Any = construct(config.data)
    meta = save(data.prepare(Path("data/raw")), Path("data/prepared") / name)
    sizes = ", ".join(f"{split} {size}" for split, size in meta["sizes"].items())
    print(f"prepare {name}: {sizes} examples of {meta['length']} tokens in data/prepared/{name}", flush=True)
    for baseline, value in meta["baselines"].items():
        print(f"prepare {name}: {baseline} {value:.4f} {meta['metric']}", flush=True)


if __name__ == "__main__":
    main()
