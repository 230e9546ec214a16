"""Weights to begin with: everything but the head is taken over, nothing else is, and the run says so."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from attnlens.data.module import DataModule
from attnlens.models.build import build_model
from attnlens.training import seed as seeds
from attnlens.training.initial import initial_file, load_initial
from attnlens.training.seed import run_seed
from tests.training.test_seed import contents, fresh, interrupt

POOLED = "model.head._target_=attnlens.models.heads.PooledHead"


def model(study, *overrides, seed=0):
    config = OmegaConf.create(dict(study(*overrides).config))
    return build_model(config, DataModule("data/prepared/mqar", batch_size=1, seed=0).meta, seed=seed)


@pytest.fixture
def trained(study):
    return Path(run_seed(study()).results) / "model.safetensors"


def test_the_body_is_taken_over_and_the_head_is_new(study, trained):
    fresh_model = model(study, POOLED, seed=1)
    before = {name: tensor.clone() for name, tensor in fresh_model.state_dict().items()}
    initial, saved = load_initial(fresh_model, trained), load_file(trained)
    assert set(initial.loaded) | set(initial.new) == before.keys()
    # The linear map of the pooled head has the name and shape of the other head's, its bias has no counterpart.
    assert initial.new == ("head.linear.bias",)
    for name, tensor in fresh_model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in initial.new else saved[name])


def test_a_head_of_another_shape_is_new(study, trained, tmp_path):
    tensors = load_file(trained)
    tensors["head.linear.weight"] = torch.zeros(3, 16)
    save_file(tensors, tmp_path / "other.safetensors")
    assert load_initial(model(study), tmp_path / "other.safetensors").new == ("head.linear.weight",)


@pytest.mark.parametrize("override", ["model.width=32", "model.num_layers=3", "model.num_layers=1", "position=learned"])
def test_another_body_is_refused(study, trained, override):
    changed = model(study, override)
    before = {name: tensor.clone() for name, tensor in changed.state_dict().items()}
    with pytest.raises(ValueError, match=r"`training.initial` .* is of another model: it does not fit"):
        load_initial(changed, trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in changed.state_dict().items())


def test_a_damaged_file_is_refused(study, trained):
    trained.write_bytes(trained.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"`training.initial` .* is damaged"):
        load_initial(model(study), trained)


def test_a_file_a_seed_and_a_cell_name_the_weights(tmp_path):
    for seed in (0, 2):
        (tmp_path / "cell" / f"seed{seed}").mkdir(parents=True)
        (tmp_path / "cell" / f"seed{seed}" / "model.safetensors").touch()
    file = tmp_path / "cell" / "seed2" / "model.safetensors"
    assert initial_file(file, 0) == initial_file(file.parent, 0) == initial_file(tmp_path / "cell", 2) == file
    with pytest.raises(ValueError, match=r"no model.safetensors for seed 1 \(there: \['seed0', 'seed2'\]\)"):
        initial_file(tmp_path / "cell", 1)


def test_a_run_begins_where_the_other_ended_and_resumes_to_the_byte(study, trained, monkeypatch, capsys):
    """With a rate of 0 nothing moves: the weights are those that were given."""
    given = Path("given.safetensors")
    given.write_bytes(trained.read_bytes())
    still = study(f"training.initial={given}", "training.learning_rate=0", "training.weight_decay=0", seed=3)
    found = load_file(Path(run_seed(still).results) / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(given).items())
    assert f"tensors from {given}; new: none" in capsys.readouterr().out
    job = study(f"training.initial={given}", "training.checkpoint_every=5")
    expected = fresh(job, "whole")
    assert expected != contents_without(study)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="interrupted"):
        patch.setattr(seeds, "examine", interrupt)
        run_seed(job)
    assert contents(run_seed(job).results) == expected


def contents_without(study):
    return fresh(study("training.checkpoint_every=5"), "scratch")


def test_other_initial_weights_start_over(study, trained, monkeypatch, capsys):
    """The path is the same, the file is not: what was half trained from the old one is not continued."""
    given = Path("given.safetensors")
    given.write_bytes(trained.read_bytes())
    job = study(f"training.initial={given}")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="interrupted"):
        patch.setattr(seeds, "examine", interrupt)
        run_seed(job)
    tensors = load_file(given)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, given)
    metrics = json.loads(contents(run_seed(job).results)["metrics.json"])
    said = capsys.readouterr().out
    assert "starting over" in said
    assert "resuming" not in said
    assert metrics["steps"] == 20
