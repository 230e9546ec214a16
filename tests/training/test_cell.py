"""A cell: seeds in processes, one folder, failures that are not swallowed."""

import json
from pathlib import Path

import pytest

from attnlens.training import cell as cells
from attnlens.training.cell import train_cell
from attnlens.training.seed import run_seed


@pytest.fixture
def in_process(monkeypatch):
    """Workers take seconds to import; what they return is the same here."""
    monkeypatch.setattr(cells, "_run", lambda jobs, workers: [run_seed(job) for job in jobs])


def test_a_cell_holds_its_seeds_and_leaves_no_checkpoint(study, in_process):
    jobs = [study(seed=seed) for seed in (0, 1)]
    out = Path("models/softmax/mqar")
    (out / "stale").mkdir(parents=True)
    cell = train_cell(jobs, out, workers=2)
    assert cell == json.loads((out / "cell.json").read_text())
    assert {
        "status": "ok",
        "reason": None,
        "attention": "softmax",
        "data": "mqar",
        "seeds": [0, 1],
    }.items() <= cell.items()
    assert cell["parameters"] > 0
    assert sorted(path.name for path in out.iterdir()) == ["cell.json", "seed0", "seed1"]
    assert not [path for path in Path("outputs/checkpoints").rglob("*") if path.is_file()]


def test_a_cell_that_mathematics_rules_out_says_why(study, in_process):
    out = Path("models/smyrf/mqar_causal")
    cell = train_cell([study(data="mqar_causal", attention="smyrf")], out, workers=1)
    assert cell["status"] == "not_applicable"
    assert "`causal=True` is not possible with" in cell["reason"]
    assert [path.name for path in out.iterdir()] == ["cell.json"]


def test_a_failing_worker_fails_the_cell_and_leaves_nothing(study):
    """The real processes: what a worker raises arrives here with the line that raised it."""
    job = study("+attention.wrong=1")
    with pytest.raises(ValueError, match="`wrong` is not an argument of Softmax") as caught:
        train_cell([job], Path("models/x"), workers=2)
    assert "run_seed" in str(caught.value.__cause__)
    assert not Path("models/x").exists()


def test_no_seed_or_no_worker_is_refused(study):
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 2"):
        train_cell([], Path("models/x"), workers=2)
