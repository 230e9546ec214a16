"""Cells on disk become rows: means, intervals, comparisons, refusals."""

import numpy as np
import pytest

from attnlens.analysis.accuracy import accuracy
from attnlens.files import write_json
from attnlens.study import Study

from .cells import write_cell, write_refusal

OPTIONS = {"confidence": 0.95, "margin": 0.01, "resamples": 300, "seed": 0}


def study(data="mqar", seeds=3, attention=("softmax", "good", "bad", "refused")):
    return Study((), (data,), attention, "mha", seeds, (0.25,), "softmax")


def write(root, data="mqar", seeds=3):
    """`good` is 0.2 above softmax in score, `bad` 0.2 below."""
    generator = np.random.default_rng(0)
    hard = generator.uniform(0.3, 0.7, 80)
    for name, shift in {"softmax": 0.0, "good": 0.2, "bad": -0.2}.items():
        noise = generator.normal(0, 0.01, (seeds, 80))
        write_cell(root, name, data, causal=False, seeds=seeds, scores=list(hard + shift + noise))
    write_refusal(root, "refused", data, "it cannot be causal")
    write_json(root / f"data/prepared/{data}/meta.json", {"baselines": {"trigram": 3.0}})


def by_name(rows):
    return {row["attention"]: row for row in rows}


def test_rows_of_a_study(tmp_path):
    write(tmp_path)
    rows = accuracy(study(), tmp_path, **OPTIONS)
    assert [row["attention"] for row in rows] == ["softmax", "good", "bad", "refused"]
    found = by_name(rows)
    assert found["good"]["verdict"] == "better"
    assert found["bad"]["verdict"] == "worse"
    assert found["softmax"]["verdict"] == "reference"
    assert found["softmax"]["versus"] == {}
    versus = found["good"]["versus"]["softmax"]
    assert versus["low"] < versus["difference"] < versus["high"]
    assert versus["difference"] == pytest.approx(0.2, abs=0.01)
    for row in rows[:3]:
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1
        assert row["mean"] == pytest.approx(np.mean(row["values"]))
        assert row["seeds"] == [0, 1, 2]
        assert row["baselines"] == {"trigram": 3.0}
    assert found["refused"]["status"] == "not_applicable"
    assert found["refused"]["reason"] == "it cannot be causal"


def test_lower_is_better_turns_the_verdict(tmp_path):
    write(tmp_path, "shakespeare")
    found = by_name(accuracy(study("shakespeare"), tmp_path, **OPTIONS))
    assert found["good"]["verdict"] == "worse"
    assert found["bad"]["verdict"] == "better"


def test_two_seeds_are_too_few_for_a_verdict_but_not_for_an_interval(tmp_path):
    write(tmp_path, seeds=2)
    row = by_name(accuracy(study(seeds=2), tmp_path, **OPTIONS))["good"]
    assert row["verdict"] == "too few seeds"
    assert row["low"] < row["mean"] < row["high"]


def test_the_same_study_gives_the_same_rows(tmp_path):
    write(tmp_path)
    once, twice = (accuracy(study(), tmp_path, **OPTIONS) for _ in range(2))
    assert once == twice


def test_a_missing_cell_names_its_command(tmp_path):
    write(tmp_path)
    attention = ("softmax", "good", "absent")
    with pytest.raises(ValueError, match="dvc repro train@mqar-absent"):
        accuracy(study(attention=attention), tmp_path, **OPTIONS)


def test_scores_that_contradict_their_metric_are_refused(tmp_path):
    write(tmp_path)
    np.save(tmp_path / "models/good/mqar/seed1/scores.npy", np.full(80, 0.1))
    with pytest.raises(ValueError, match=r"models/good/mqar/seed1.*dvc repro -f train@mqar-good"):
        accuracy(study(), tmp_path, **OPTIONS)


def test_scores_of_unequal_length_are_refused(tmp_path):
    write(tmp_path)
    np.save(tmp_path / "models/good/mqar/seed1/scores.npy", np.full(79, 0.1))
    with pytest.raises(ValueError, match="unequal, empty or not finite"):
        accuracy(study(), tmp_path, **OPTIONS)
