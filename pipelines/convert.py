"""Convert a pretrained model in every way that fits it, and score what is left.

    python pipelines/convert.py pretrained=smollm2
    python -m attnlens.report.conversions results/convert docs/figures/conversions.png

Reads the fetched model and text; writes results/convert/<model>.json.
"""

import sys
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="../conf", config_name="convert", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, convert, score, write; then log."""
    import torch

    from attnlens.conversion.study import convert
    from attnlens.files import write_json

    torch.set_num_threads(1)
    options = cast(dict[str, Any], OmegaConf.to_container(cfg.conversion))
    result = convert(cfg.pretrained, Path.cwd(), options)
    path = Path(f"results/convert/{cfg.pretrained}.json")
    write_json(path, result | {"options": options})
    print(f"{path}: {len(result['rows'])} settings, {result['metric']} {result['value']:.4g} before", flush=True)

    from attnlens import tracking

    folder = Path("outputs") / "convert" / cfg.pretrained
    with tracking.run(
        job_type="convert",
        name=f"convert-{cfg.pretrained}",
        group=cfg.study,
        config=options,
        folder=folder,
        logger=cfg.logger,
    ) as run:
        run.summary({f"{row['conversion']}/{row['setting']}": row["value"] for row in result["rows"]})
        run.artifact(f"convert-{cfg.pretrained}", "results", [path])


if __name__ == "__main__":
    main()
