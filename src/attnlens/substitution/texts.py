"""Works of a fetched text source, by name."""

from pathlib import Path

from attnlens.data.fetch import read_source

SUFFIX = "_gut.txt"


def read_work(root: Path, source: str, name: str) -> str:
    """The text of one work below data/raw.

    Raises:
        ValueError: the source has not been fetched, or has no such work.
    """
    texts, _ = read_source(root / "data/raw" / source)
    works = {file.removesuffix(SUFFIX): text for file, text in texts.items()}
    if name not in works:
        raise ValueError(f"`{name}` is no work of {source}: choose from {sorted(works)}")
    return works[name]
