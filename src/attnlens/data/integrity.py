"""Files are what they were: SHA-256 recorded when a folder is written, compared before it is read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(folder: Path, files: Mapping[str, str], remedy: str) -> None:
    """Compare each file of `folder` with its recorded hash.

    Raises:
        ValueError: a file is missing, cut short or changed; the message ends with `remedy`.
    """
    for name, expected in files.items():
        path = folder / name
        found = sha256(path) if path.is_file() else "no such file"
        if found != expected:
            raise ValueError(f"`{path}` is damaged: expected SHA-256 {expected}, found {found}; {remedy}")
