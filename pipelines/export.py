"""A trained cell as a folder that loads anywhere; beside the pipeline.

    python pipelines/export.py cell=models/softmax/shakespeare/seed0 out=exported/shakespeare
    python pipelines/export.py cell=models/mean/mqar/seed0 prepared=data/prepared/mqar out=exported/mqar

and elsewhere: `from attnlens.export import load_exported; model = load_exported("exported/shakespeare")`.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
def main(config: DictConfig) -> None:
    """Load, check, write; paths are relative to the folder the command runs in."""
    from attnlens.export import export

    written = export(config.cell, config.prepared, config.out)
    print(f"export {config.cell}: {', '.join(sorted(written['files']))} and config.json, in {config.out}", flush=True)


if __name__ == "__main__":
    main()
