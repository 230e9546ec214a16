"""The script as DVC calls it: from the study's folder, with Hydra overrides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from attnlens.files import read_json, write_json

ROOT = Path(__file__).parents[2]
AXES = {"source": [], "data": ["mqar"], "attention": ["softmax", "random_keys"], "projection": "mha", "seeds": 1}


def run(script, folder, *overrides, logger=True):
    """Run the script in `folder`; `logger`: whether it tracks its runs."""
    tracked = ["logger=csv"] if logger else []
    command = [sys.executable, str(ROOT / "pipelines" / script), *tracked, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def write_study(folder, attention=AXES["attention"]):
    axes = AXES | {"attention": attention, "budgets": [0.25, 0.5], "reference": "softmax"}
    axes |= {"subject": [], "substitution": [], "pretrained": []}
    (folder / "params.yaml").write_text(yaml.safe_dump(axes))
    generator = torch.Generator().manual_seed(0)
    for name in attention:
        cell = folder / "models" / name / "mqar"
        write_json(cell / "cell.json", {"status": "ok", "reason": None, "seeds": [0]})
        (cell / "seed0").mkdir()
        q, k, v = torch.randn(3, 2, 2, 32, 8, generator=generator)
        tensors = {"layer0.q": q.contiguous(), "layer0.k": k.contiguous(), "layer0.v": v.contiguous()}
        save_file(tensors, cell / "seed0/qkv.safetensors", metadata={"causal": "false"})
        save_file({"head": torch.zeros(1)}, cell / "seed0/model.safetensors")


def test_it_writes_the_cell(tmp_path):
    write_study(tmp_path)
    done = run("approximate.py", tmp_path, "attention=random_keys", "analysis.draws=2")
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "results/approximate/random_keys.json")
    assert result["attention"] == "random_keys"
    assert result["budget_argument"] == "num_keys"
    assert len(result["rows"]) == 2 * 2 * 2
    assert {row["draws"] for row in result["rows"]} == {2}
    assert "approximate random_keys: mqar, seed 0" in done.stdout


def test_measuring_imports_no_training_and_no_tracking():
    code = (
        "import sys, json, attnlens.analysis.approximate, attnlens.analysis.accuracy; print(json.dumps([*sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not set(json.loads(done.stdout)) & {"pytorch_lightning", "datasets", "wandb", "altair", "torch._dynamo"}


def test_an_unknown_operator_lists_the_choices(tmp_path):
    write_study(tmp_path, ["softmax"])
    done = run("approximate.py", tmp_path, "attention=no_such_method")
    assert done.returncode != 0
    assert "random_keys" in done.stderr
