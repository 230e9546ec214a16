"""Whole files or none."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from attnlens.files import atomic, read_json, write_json


def test_a_failure_leaves_what_stood_there(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(OSError), atomic(target) as aside:
        aside.write_text("half")
        raise OSError("no space left on device")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("a", "b"):
        with atomic(tmp_path / "cell") as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert [path.name for path in (tmp_path / "cell").iterdir()] == ["b"]


def test_a_kill_leaves_no_half_written_target(tmp_path):
    script = (
        "import sys, time; from attnlens.files import atomic\n"
        "with atomic(sys.argv[1]) as aside:\n"
        "    aside.write_text('half'); print('written', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "out.json"
    process = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    time.sleep(0.05)
    assert not target.exists()


def test_equal_values_give_equal_bytes_and_nan_is_refused(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1.5, "a": [1]})
    write_json(tmp_path / "b.json", {"a": [1], "b": 1.5})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": [1], "b": 1.5}
    with pytest.raises(ValueError):
        write_json(tmp_path / "c.json", {"a": float("nan")})


def test_a_cut_file_names_the_remedy(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": list(range(100))})[:50])
    with pytest.raises(ValueError, match="dvc repro"):
        read_json(path)
