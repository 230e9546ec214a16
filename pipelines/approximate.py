"""Measure how well one operator approximates exact attention on captured queries, keys and values.

    python pipelines/approximate.py attention=performer

Reads params.yaml and models/; writes results/approximate/<attention>.json.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="../conf", config_name="approximate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, measure, write; then log."""
    import torch

    from attnlens.analysis.approximate import Cell, approximate, summarize
    from attnlens.files import write_json
    from attnlens.study import read_params

    torch.set_num_threads(1)
    name = HydraConfig.get().runtime.choices["attention"]
    root = Path.cwd()
    result = approximate(Cell(name, cfg.attention, read_params(root / "params.yaml"), root, cfg.analysis.draws))
    write_json(root / f"results/approximate/{name}.json", result)
    print(f"results/approximate/{name}.json: {len(result['rows'])} rows")

    from attnlens import tracking

    config = {"name": name, "attention": OmegaConf.to_container(cfg.attention), "draws": cfg.analysis.draws}
    folder = root / "outputs" / "approximate" / name
    with tracking.run(
        job_type="approximate",
        name=f"approximate-{name}",
        group=cfg.study,
        config=config,
        folder=folder,
        logger=cfg.logger,
    ) as run:
        run.summary(summarize(result))
        run.artifact(f"approximate-{name}", "results", [root / f"results/approximate/{name}.json"])


if __name__ == "__main__":
    main()
