"""Offline W&B runs are read back from their files; loggers that cannot start or finish stop nobody."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnlens import tracking
from attnlens.tracking import TrackingWarning

CSV = {"_target_": "attnlens.tracking.CsvRun"}
CONFIG = {"attention": {"num_features": 64}, "seed": 3}


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb-files"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def start(folder, logger=None):
    return tracking.run(job_type="accuracy", name="table", group="toy", config=CONFIG, folder=folder, logger=logger)


def fill(run, folder):
    """What every kind of run is given in these tests."""
    from PIL import Image

    Image.new("RGB", (4, 4)).save(folder / "square.png")
    (folder / "meta.json").write_text("{}")
    for step in range(3):
        run.log({"loss": 1 / (step + 1)})
    run.summary({"accuracy": 0.75})
    run.table("verdicts", ["attention", "accuracy"], [["softmax", 1.0], ["smyrf", "not applicable"]])
    run.figure("square", folder / "square.png")
    run.artifact("mqar", "dataset", [folder / "meta.json"], {"sha256": "abc"})


def inspect(folder, *flags):
    """What `wandb leet inspect --json` says about the one run below `folder`."""
    [path] = Path(folder).rglob("*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", *flags, "--json", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_offline_run_holds_all_of_it(tmp_path, capfd):
    with start(tmp_path / "run") as run:
        fill(run, tmp_path)
    summary = json.loads(inspect(tmp_path / "run", "--summary"))
    assert summary["config"] == CONFIG
    assert summary["summary"]["accuracy"] == 0.75
    assert (summary["name"], summary["project"], summary["state"]) == ("table", "attnlens", "finished")
    records = [json.loads(line) for line in inspect(tmp_path / "run").splitlines()]
    [started] = [record["run"] for record in records if record["type"] == "run"]
    assert (started["run_group"], started["job_type"]) == ("toy", "accuracy")
    losses = [record["history"] for record in records if record["type"] == "history"]
    assert [item["loss"] for item in map(values, losses) if "loss" in item] == [1.0, 0.5, 1 / 3]
    [table] = (tmp_path / "run").rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [["softmax", 1.0], ["smyrf", "not applicable"]]
    assert list((tmp_path / "run").rglob("*.png"))
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert [item["path"] for item in artifacts[-1]["manifest"]["contents"]] == ["meta.json"]
    assert "wandb sync" in capfd.readouterr().out


def values(history):
    """A history record's metrics, whichever way the viewer nests them."""
    return history.get("item", history.get("metrics", history))


def test_a_large_file_is_referred_to_and_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "LARGEST_COPY", 10)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "large.bin").write_bytes(b"x" * 11)
    (tmp_path / "weights" / "small.bin").write_bytes(b"x" * 10)
    with start(tmp_path / "run") as run:
        run.artifact("weights", "model", [tmp_path / "weights"])
    records = [json.loads(line) for line in inspect(tmp_path / "run").splitlines()]
    [artifact] = [record["artifact"] for record in records if record["type"] == "artifact"]
    entries = {item["path"]: item for item in artifact["manifest"]["contents"]}
    assert entries["weights/large.bin"]["ref"].startswith("file://")
    assert "ref" not in entries["weights/small.bin"]


def test_an_error_inside_is_not_hidden_and_the_run_is_closed_as_failed(tmp_path):
    with pytest.raises(KeyError), start(tmp_path / "run"):
        raise KeyError("oh")
    assert json.loads(inspect(tmp_path / "run", "--summary"))["state"] == "failed"


def test_csv_files_hold_all_of_it(tmp_path):
    folder = tmp_path / "run"
    with start(folder, CSV) as run:
        fill(run, tmp_path)
        run.log({"loss": 0.1, "late": 2})
    assert json.loads((folder / "config.json").read_text())["config"] == CONFIG
    assert (folder / "log.csv").read_text().splitlines() == ["loss,late", "1.0,", "0.5,", f"{1 / 3},", "0.1,2"]
    assert json.loads((folder / "summary.json").read_text()) == {"accuracy": 0.75}
    assert (folder / "tables" / "verdicts.csv").read_text().splitlines()[2] == "smyrf,not applicable"
    assert (folder / "figures" / "square.png").read_bytes() == (tmp_path / "square.png").read_bytes()
    assert json.loads((folder / "artifacts.json").read_text())[0]["metadata"] == {"sha256": "abc"}
    assert json.loads((folder / "state.json").read_text()) == {"state": "finished"}


def broken_init(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize("how", ["missing", "init fails"])
def test_a_logger_that_cannot_start_becomes_csv_files(tmp_path, monkeypatch, how):
    if how == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setattr("wandb.init", broken_init)
    with pytest.warns(TrackingWarning, match="WandbRun cannot start .* CSV"), start(tmp_path / "run") as run:
        fill(run, tmp_path)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"accuracy": 0.75}


def test_no_network_means_no_hang(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    import wandb

    wandb.teardown()  # What it read from the environment for earlier tests is kept in its service.
    begin = time.monotonic()
    online = {**tracking.WANDB, "mode": "online", "init_timeout": 2}
    with pytest.warns(TrackingWarning, match=r"(?s)CommError.*CSV"), start(tmp_path / "run", online) as run:
        run.summary({"accuracy": 0.5})
    assert time.monotonic() - begin < 30
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"accuracy": 0.5}


def test_a_logger_that_cannot_finish_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.CsvRun, "finish", broken_init)
    with pytest.warns(TrackingWarning, match="did not finish"), start(tmp_path / "run", CSV) as run:
        run.summary({"accuracy": 1.0})


@pytest.mark.parametrize(
    "logger", [{"_target_": "attnlens.tracking.WandbRun", "mode": "sometimes"}, {**CSV, "x": 1}, {}]
)
def test_a_mistake_in_the_config_is_not_covered_up(tmp_path, logger):
    with pytest.raises(ValueError, match=r"`(mode|x|logger)`"), start(tmp_path / "run", logger or {"x": 1}):
        pass


def test_the_environment_chooses_the_mode_unless_the_config_does(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with start(tmp_path / "environment") as run:
        run.log({"loss": 1.0})
    with start(tmp_path / "config", {**tracking.WANDB, "mode": "offline"}) as run:
        run.log({"loss": 1.0})
    assert not list((tmp_path / "environment").rglob("*.wandb"))
    assert list((tmp_path / "config").rglob("*.wandb"))
