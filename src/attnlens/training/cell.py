"""A cell of the study: the seeds of one (data, attention) in a few processes, and one folder that holds them all."""

import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

from attnlens.files import atomic, write_json
from attnlens.training.job import Job, Outcome


def train_cell(jobs: Sequence[Job], out: Path, *, workers: int) -> dict[str, object]:
    """Run the jobs, at most `workers` at once and one thread each, and write the folder `out` as a whole.

    Returns:
        What was written to `cell.json`.

    Raises:
        ValueError: no job, or no worker to run it.
        Exception: whatever a worker raised, with its traceback.
    """
    if not jobs or workers < 1:
        raise ValueError(f"`seeds` and `workers` must be at least 1, got {len(jobs)} and {workers}")
    outcomes = _run(jobs, workers)
    reason = outcomes[0].reason
    cell = {
        "status": "ok" if reason is None else "not_applicable",
        "reason": reason,
        "attention": jobs[0].attention,
        "data": jobs[0].data,
        "seeds": [job.seed for job in jobs],
        "parameters": outcomes[0].parameters,
    }
    with atomic(out) as aside:
        aside.mkdir()
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome.results is not None:
                shutil.copytree(outcome.results, aside / f"seed{job.seed}")
        write_json(aside / "cell.json", cell)
    for outcome in outcomes:
        # Only now: a kill before this line finds everything again.
        if outcome.results is not None:
            shutil.rmtree(Path(outcome.results).parent)
    return cell


def _run(jobs: Sequence[Job], workers: int) -> list[Outcome]:
    # The environment of the workers: one thread each, since two such processes do twice the work of one and two
    # threads do not, and the folder of this package, which a script may have put on the path by hand.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    source = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([source, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    )
    # A server that imports once and forks: imports cost more than some trainings. It never runs anything itself, so
    # that forking it is safe, where forking this process may not be.
    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        # Inside a worker of joblib, whose own method the standard library does not know and would still pass on.
        multiprocessing.set_start_method("forkserver", force=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attnlens.training.seed", "wandb"])
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_follow_parent) as pool:
        futures = [pool.submit(_run_seed, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _run_seed(job: Job) -> Outcome:
    from attnlens.training.seed import run_seed

    try:
        return run_seed(job)
    finally:
        sys.stdout.flush()


def _follow_parent() -> None:
    """End this worker when its parent is gone: left alone, it would write to checkpoints that a new run reads."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
