"""Relative variance of the random features of the softmax kernel, against the scale of the logits.

    python pipelines/variance.py

Reads params.yaml and the reference models; writes results/variance.json.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="../conf", config_name="variance", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, measure, write; then log."""
    import torch

    from attnlens.analysis.variance import summarize, variance
    from attnlens.files import write_json
    from attnlens.study import read_params

    torch.set_num_threads(1)
    root = Path.cwd()
    result = variance(read_params(root / "params.yaml"), root, cfg.analysis)
    write_json(root / "results/variance.json", result)
    print(f"results/variance.json: {len(result['gaussian'])} logit scales, {len(result['reference'])} trained heads")

    from attnlens import tracking

    config = {"analysis": OmegaConf.to_container(cfg.analysis)}
    folder = root / "outputs" / "variance"
    with tracking.run(
        job_type="variance", name="variance", group=cfg.study, config=config, folder=folder, logger=cfg.logger
    ) as run:
        run.summary(summarize(result))
        run.artifact("variance", "results", [root / "results/variance.json"])


if __name__ == "__main__":
    main()
