"""Measure how the error of one operator falls with its budget on Gaussian inputs, and its order.

    python pipelines/converge.py attention=performer

Writes results/converge/<attention>.json.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="../conf", config_name="converge", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, measure, write; then log."""
    import torch

    from attnlens.analysis.converge import converge, ensemble, summarize
    from attnlens.files import write_json

    torch.set_num_threads(1)
    name = HydraConfig.get().runtime.choices["attention"]
    root = Path.cwd()
    result = {"attention": name} | converge(cfg.attention, ensemble(cfg.analysis))
    write_json(root / f"results/converge/{name}.json", result)
    print(f"results/converge/{name}.json: {result['reason'] or len(result['points'])}")

    from attnlens import tracking

    config = {
        "name": name,
        "attention": OmegaConf.to_container(cfg.attention),
        "analysis": OmegaConf.to_container(cfg.analysis),
    }
    folder = root / "outputs" / "converge" / name
    with tracking.run(
        job_type="converge", name=f"converge-{name}", group=cfg.study, config=config, folder=folder, logger=cfg.logger
    ) as run:
        run.summary(summarize(result))
        run.artifact(f"converge-{name}", "results", [root / f"results/converge/{name}.json"])


if __name__ == "__main__":
    main()
