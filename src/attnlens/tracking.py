"""Runs as a dashboard sees them: W&B, offline unless asked otherwise, or plain CSV files. A window, never the record.

    with tracking.run(job_type="accuracy", name="accuracy", group="default", config={...}, folder=folder) as run:
        run.log({"loss": 0.1})
        run.table("verdicts", ["attention", "accuracy"], [["softmax", 1.0]])

A logger that cannot start is replaced by CSV files with a warning. Everything lies below `folder`; an offline run
is opened with `wandb leet` or uploaded with `wandb sync`, whose command `run` prints when the run ends.
"""

import csv
import os
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from attnlens.construct import construct
from attnlens.files import atomic, write_json

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

WANDB = {"_target_": "attnlens.tracking.WandbRun"}
# Above this a file is referred to by its place and size in place of being copied into the run's folder.
LARGEST_COPY = 5 * 2**20
# Seconds that an online run may take to hand over what is left when it ends.
FINISH_TIMEOUT = 120


class TrackingWarning(UserWarning):
    """A logger could not start or finish; the run itself goes on."""


@contextmanager
def run(
    *,
    job_type: str,
    name: str,
    group: str,
    config: Mapping[str, object],
    folder: Path | str,
    logger: Mapping[str, object] | None = None,
) -> Iterator["AbstractRun"]:
    """A run that is open inside the `with` and finished after it, whatever happens there.

    Args:
        job_type: the stage.
        name: what a dashboard calls the run.
        group: the study.
        config: resolved.
        folder: takes everything that is written; below outputs/, since none of it belongs to the record.
        logger: a file of conf/logger/, W&B without one.
    """
    offered = {"job_type": job_type, "name": name, "group": group, "config": dict(config), "folder": Path(folder)}
    opened = _start(logger or WANDB, offered)
    failed = True
    try:
        yield opened
        failed = False
    finally:
        try:
            opened.finish(failed=failed)
        # Finishing may fail in any way a network or a disk can; the work is done and must not be lost for it.
        except Exception as error:
            warnings.warn(f"tracking of {name} did not finish: {error!r}", TrackingWarning, stacklevel=3)


def _start(logger: Mapping[str, object], offered: Mapping[str, Any]) -> "AbstractRun":
    if "_target_" not in logger:
        raise ValueError(f"`logger` is {dict(logger)!r}: name a file of conf/logger/")
    try:
        return construct(logger, offered)
    except ValueError:
        raise  # A mistake in the config is the user's to mend, not a logger that cannot start.
    # Whatever stops a logger (package missing, no network, a refused key, a full disk) must not stop a run.
    except Exception as error:
        text = f"{logger['_target_']} cannot start ({error!r}): writing CSV files to {offered['folder']} instead"
        warnings.warn(text, TrackingWarning, stacklevel=4)
        return CsvRun(**offered)


class AbstractRun(ABC):
    """One run of one stage."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float]) -> None:
        """A further row of the run's curves."""

    @abstractmethod
    def summary(self, values: Mapping[str, float | str | None]) -> None:
        """Final values."""

    @abstractmethod
    def figure(self, name: str, path: Path | str) -> None:
        """An image file."""

    @abstractmethod
    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table."""

    @abstractmethod
    def artifact(
        self, name: str, type: str, paths: Iterable[Path | str], metadata: Mapping[str, object] | None = None
    ) -> None:
        """Files and folders that the run used or made; large ones are referred to, not copied."""

    @abstractmethod
    def lightning(self) -> "Logger":
        """The logger to give to Lightning's Trainer, writing into this run."""

    @abstractmethod
    def finish(self, *, failed: bool) -> None:
        """Close the run."""


@final
class WandbRun(AbstractRun):
    """A W&B run.

    Args:
        project: that W&B files it under.
        mode: "offline", "online", "disabled"; None: what WANDB_MODE says, "offline" if it says nothing.
        init_timeout: seconds to wait for a server.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        job_type: str,
        name: str,
        group: str,
        config: Mapping[str, object],
        folder: Path,
        *,
        project: str = "attnlens",
        mode: str | None = None,
        init_timeout: float | int = 20,
    ) -> None:
        mode = mode or os.environ.get("WANDB_MODE", "offline")
        if mode not in ("offline", "online", "disabled"):
            raise ValueError(f"`mode` of the logger (or WANDB_MODE) is {mode!r}: choose offline, online or disabled")
        folder.mkdir(parents=True, exist_ok=True)
        # What artifacts stage and cache belongs beside the run, not in the home folder.
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(variable, str((folder / "wandb-files").absolute()))
        import wandb

        settings = wandb.Settings(
            mode=mode,
            silent=True,
            console="off",
            x_disable_stats=True,
            disable_code=True,
            init_timeout=init_timeout,
            login_timeout=round(init_timeout),
            finish_timeout=FINISH_TIMEOUT,
        )
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            group=group,
            job_type=job_type,
            name=name,
            dir=folder,
            config=dict(config),
            settings=settings,
        )
        self.mode = mode

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self._run.settings.sync_dir)

    def log(self, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics))

    def summary(self, values: Mapping[str, float | str | None]) -> None:
        self._run.summary.update(dict(values))

    def figure(self, name: str, path: Path | str) -> None:
        self._run.log({name: self._wandb.Image(str(path))})

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        # Mixed columns (a number here, "not applicable" there) are what tables of results are made of.
        data: list[Any] = [list(row) for row in rows]
        self._run.log({name: self._wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

    def artifact(
        self, name: str, type: str, paths: Iterable[Path | str], metadata: Mapping[str, object] | None = None
    ) -> None:
        artifact = self._wandb.Artifact(name, type=type, metadata=dict(metadata or {}))
        for path in map(Path, paths):
            for file in _files(path):
                entry = file.relative_to(path.parent).as_posix()
                if file.stat().st_size <= LARGEST_COPY:
                    artifact.add_file(str(file), name=entry)
                else:
                    artifact.add_reference(file.absolute().as_uri(), name=entry, checksum=False)
        self._run.log_artifact(artifact)

    def lightning(self) -> "Logger":
        from pytorch_lightning.loggers import WandbLogger

        return WandbLogger(experiment=self._run)

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        if self.mode == "offline":
            print(f"tracking: wandb sync {_shown(self.path)}", flush=True)


@final
class CsvRun(AbstractRun):
    """The same as files: log.csv, lightning/metrics.csv, config.json, summary.json, tables/, figures/."""

    def __init__(self, job_type: str, name: str, group: str, config: Mapping[str, object], folder: Path) -> None:
        self.folder = folder
        self._rows: list[dict[str, object]] = []
        self._summary: dict[str, object] = {}
        self._artifacts: list[dict[str, object]] = []
        write_json(folder / "config.json", {"job_type": job_type, "name": name, "group": group, "config": dict(config)})

    def log(self, metrics: Mapping[str, float]) -> None:
        self._rows.append(dict(metrics))
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        _write_csv(self.folder / "log.csv", columns, ([row.get(key, "") for key in columns] for row in self._rows))

    def summary(self, values: Mapping[str, float | str | None]) -> None:
        self._summary.update(values)
        write_json(self.folder / "summary.json", self._summary)

    def figure(self, name: str, path: Path | str) -> None:
        with atomic(self.folder / "figures" / f"{name}{Path(path).suffix}") as aside:
            shutil.copyfile(path, aside)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        _write_csv(self.folder / "tables" / f"{name}.csv", columns, rows)

    def artifact(
        self, name: str, type: str, paths: Iterable[Path | str], metadata: Mapping[str, object] | None = None
    ) -> None:
        entry = {"name": name, "type": type, "paths": [str(path) for path in paths], "metadata": dict(metadata or {})}
        self._artifacts.append(entry)
        write_json(self.folder / "artifacts.json", self._artifacts)

    def lightning(self) -> "Logger":
        from pytorch_lightning.loggers import CSVLogger

        # It warns of files of an earlier run in the same folder, and removes them: the second without the first.
        shutil.rmtree(self.folder / "lightning", ignore_errors=True)
        return CSVLogger(str(self.folder), name="lightning", version="")

    def finish(self, *, failed: bool) -> None:
        write_json(self.folder / "state.json", {"state": "failed" if failed else "finished"})


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with atomic(path) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
