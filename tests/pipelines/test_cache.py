"""The stage script of caches as DVC calls it."""

import torch
import yaml
from safetensors.torch import save_file

from attnlens.files import read_json
from tests.pipelines.test_approximate import AXES, run


def write_study(folder, causal):
    axes = AXES | {
        "attention": ["softmax"],
        "budgets": [0.5],
        "reference": "softmax",
        "subject": [],
        "substitution": [],
        "pretrained": [],
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(axes))
    cell = folder / "models/softmax/mqar/seed0"
    cell.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer0.{name}": torch.randn(2, 2, 16, 8, generator=generator) for name in "qkv"}
    save_file(tensors, cell / "qkv.safetensors", metadata={"causal": causal})


def test_it_measures_every_rung_on_causal_models(tmp_path):
    write_study(tmp_path, "true")
    done = run("cache.py", tmp_path, "analysis.fractions=[0.25]", "analysis.bits=[4]")
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "results/cache.json")
    assert len(result["rows"]) == (1 + 3) * 2 + 1
    assert {row["source"] for row in result["rows"]} == {"mqar"}


def test_a_study_without_causal_models_says_so(tmp_path):
    write_study(tmp_path, "false")
    done = run("cache.py", tmp_path)
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "results/cache.json")
    assert result["rows"] == []
    assert "no reference model is causal" in result["reason"]
    assert "no reference model is causal" in done.stdout
