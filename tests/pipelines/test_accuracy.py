"""The script as DVC calls it: from the study's folder."""

import numpy as np
import yaml

from attnlens.files import read_json, write_json

from .test_approximate import run


def write_study(folder, trained=("softmax", "mean")):
    axes = {"source": [], "data": ["mqar"], "attention": ["softmax", "mean"], "projection": "mha", "seeds": 3}
    (folder / "params.yaml").write_text(
        yaml.safe_dump(
            axes | {"budgets": [0.25], "reference": "softmax", "subject": [], "substitution": [], "pretrained": []}
        )
    )
    write_json(folder / "data/prepared/mqar/meta.json", {"baselines": {"guess": 0.125}})
    generator = np.random.default_rng(0)
    for name in trained:
        cell = folder / "models" / name / "mqar"
        write_json(cell / "cell.json", {"status": "ok", "reason": None, "seeds": [0, 1, 2]})
        for seed in range(3):
            scores = generator.uniform(0.8, 1, 50) if name == "softmax" else generator.uniform(0, 0.4, 50)
            metrics = {"metric": "accuracy", "higher_is_better": True, "value": float(scores.mean())}
            write_json(cell / f"seed{seed}/metrics.json", metrics)
            np.save(cell / f"seed{seed}/scores.npy", scores)


def test_it_writes_the_rows(tmp_path):
    write_study(tmp_path)
    done = run("accuracy.py", tmp_path)
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "results/accuracy.json")
    assert result["study"] == "default"
    assert result["margin"] == 0.01
    assert [(row["attention"], row["verdict"]) for row in result["rows"]] == [
        ("softmax", "reference"),
        ("mean", "worse"),
    ]
    assert list((tmp_path / "outputs/accuracy").rglob("*")), "the tracker wrote nothing"


def test_a_missing_cell_fails_the_stage_and_names_the_command(tmp_path):
    write_study(tmp_path, ["softmax"])
    done = run("accuracy.py", tmp_path)
    assert done.returncode != 0
    assert "dvc repro train@mqar-mean" in done.stderr
    assert not (tmp_path / "results").exists()
