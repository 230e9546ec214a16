"""The stage prepare from the outside: equal bytes from every process, and words that help when a name is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnlens.data.fetch import fetch
from attnlens.data.integrity import sha256
from attnlens.data.store import load_meta
from tests.data.corpus import source, write_archive

SCRIPT = Path(__file__).resolve().parents[2] / "pipelines" / "prepare.py"
SMALL_MQAR = ["data.num_train=40", "data.num_validation=8", "data.num_test=8"]
SMALL_TEXT = [
    "data.source=plays",
    "data.validation=[lear]",
    "data.test=[macbeth]",
    "data.tokenizer.vocabulary_size=300",
    "data.max_test_windows=3",
    "data.length=16",
]


def prepare(cwd: Path, *arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def raw(tmp_path):
    """Fetched works in each of two working folders."""
    archive = tmp_path / "plays-1.0.tar.gz"
    write_archive(archive)
    for name in ("first", "second"):
        pinned = source(sha256(archive), archive=str(archive))
        fetch(pinned, tmp_path / name / "data" / "raw" / "plays", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize(("name", "small"), [("mqar", SMALL_MQAR), ("shakespeare_bpe", SMALL_TEXT)])
def test_two_processes_write_the_same_bytes(raw, name, small):
    contents = []
    for folder in ("first", "second"):
        done = prepare(raw / folder, f"data={name}", *small, hash_seed=str(len(contents)))
        assert done.returncode == 0, done.stderr
        prepared = raw / folder / "data" / "prepared" / name
        assert f"in data/prepared/{name}" in done.stdout
        load_meta(prepared)
        contents.append({str(file.relative_to(prepared)): sha256(file) for file in prepared.rglob("*.*")})
    assert contents[0] == contents[1]
    assert {"meta.json", "train/state.json"} <= set(contents[0])


def test_unknown_names_list_the_choices(tmp_path):
    unknown_data = prepare(tmp_path, "data=mkar")
    assert unknown_data.returncode != 0
    assert "mqar_causal" in unknown_data.stderr
    unknown_argument = prepare(tmp_path, "data=mqar", "+data.pairs=4")
    assert unknown_argument.returncode != 0
    assert "`pairs` is not an argument of MQAR; valid: ['causal', 'headline', 'length'" in unknown_argument.stderr


def test_a_source_that_was_not_fetched_names_the_command(tmp_path):
    done = prepare(tmp_path, "data=shakespeare")
    assert done.returncode != 0
    assert "python pipelines/fetch.py source=shakespeare" in done.stderr
    assert not (tmp_path / "data" / "prepared").exists()
