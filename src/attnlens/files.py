"""Whole files or none: every output is written aside and renamed into place.

A full disk or a kill then leaves a temporary sibling behind, never a half-written file that a later run would
take for a whole one.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to create as a file or a folder; rename it onto `path` on success.

    What stood at `path` is replaced only after the new content is complete. On an exception the temporary is
    removed and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    nest = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    aside = nest / path.name
    try:
        yield aside
        if path.is_dir() and not path.is_symlink():
            # A folder cannot be replaced in one call: the old one steps aside first.
            os.replace(path, nest / "replaced")
        os.replace(aside, path)
    finally:
        shutil.rmtree(nest, ignore_errors=True)


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as JSON with sorted keys, so that equal values give equal bytes; NaN is refused."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
    with atomic(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str) -> object:
    """The value stored at `path`.

    Raises:
        ValueError: the file is not valid JSON (cut short or edited by hand); the remedy is to make it anew.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`{path}` is not valid JSON ({error}): delete it and run `dvc repro` to make it anew"
        ) from error
