"""Replace exact attention in a trained model by one operator: one layer at a time, and more and more of them.

    python pipelines/substitute.py subject=smollm2 attention=performer

Reads the subject's model and text; writes results/substitute/<subject>/<attention>.json.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="../conf", config_name="substitute", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, load, measure, write; then log."""
    import torch

    from attnlens.construct import construct
    from attnlens.files import write_json
    from attnlens.substitution.study import Options, substitute, summarize

    torch.set_num_threads(1)
    choices = HydraConfig.get().runtime.choices
    name, subject = choices["attention"], choices["subject"]
    print(f"substitute {name}: loading {subject}", flush=True)
    options = Options(**cfg.substitution)
    result = {"subject": subject} | substitute(name, cfg.attention, construct(cfg.subject).load(Path.cwd()), options)
    path = Path(cfg.out or f"results/substitute/{subject}/{name}.json")
    write_json(path, result)
    print(f"{path}: {len(result['layers'])} layers and states", flush=True)

    from attnlens import tracking

    config = {"name": name, "subject": subject, "attention": OmegaConf.to_container(cfg.attention)}
    with tracking.run(
        job_type="substitute",
        name=f"substitute-{subject}-{name}",
        group=cfg.study,
        config={**config, "substitution": OmegaConf.to_container(cfg.substitution)},
        folder=Path("outputs") / "substitute" / subject / name,
        logger=cfg.logger,
    ) as run:
        run.summary(summarize(result))
        run.artifact(f"substitute-{subject}-{name}", "results", [path])


if __name__ == "__main__":
    main()
