"""Error and bytes of every cache policy, decoding on captured queries, keys and values.

    python pipelines/cache.py
    python pipelines/cache.py analysis.capture=data/benchmarks/smollm2.safetensors

    python -m attnlens.report.caches results/cache.json docs/figures/caches.png

Reads params.yaml and the reference models; writes results/cache.json. The last line draws it.
"""

import sys
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="../conf", config_name="cache", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, measure, write; then log."""
    import torch

    from attnlens.analysis.cache import cache, summarize
    from attnlens.files import write_json
    from attnlens.study import read_params

    torch.set_num_threads(1)
    root = Path.cwd()
    settings = cast(dict[str, Any], OmegaConf.to_container(cfg.analysis))
    result = cache(read_params(root / "params.yaml"), root, settings)
    write_json(root / "results/cache.json", result)
    print(f"results/cache.json: {result['reason'] or len(result['rows'])}")

    from attnlens import tracking

    folder = root / "outputs" / "cache"
    with tracking.run(
        job_type="cache", name="cache", group=cfg.study, config={"analysis": settings}, folder=folder, logger=cfg.logger
    ) as run:
        run.summary(summarize(result))
        run.artifact("cache", "results", [root / "results/cache.json"])


if __name__ == "__main__":
    main()
