"""Export and reload: the same logits to the bit elsewhere, and what is wrong with a folder is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file, save_model

from attnlens.data.mqar import MQAR
from attnlens.data.store import save
from attnlens.export import export, load_exported
from attnlens.files import read_json, write_json
from attnlens.models.build import build_model
from tests.pipelines.test_approximate import run

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
SIZES = {"vocabulary_size": 16, "test_num_pairs": [1, 2], "headline": 2, "power": 0.01, "num_validation": 20}
ELSEWHERE = """
import sys, torch
from attnlens.export import load_exported
ids, mask = torch.load("inputs.pt")
torch.save({name: load_exported(name)(ids, key_padding_mask=mask) for name in sys.argv[1:]}, "logits.pt")
"""
CELLS = {
    "drawn": ("performer", "rope", "decoder"),
    "fixed": ("linformer", "learned", "encoder"),
    "trained": ("hedgehog", "none", "decoder"),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    data = MQAR(length=16, num_pairs=[2], num_train=40, num_test=24, causal=False, seed=0, **SIZES).prepare(root)
    folder = root / "prepared" / "mqar"
    meta = save(data._replace(files={"tokenizer.json": '{"a": 0}'}), folder)
    return folder, meta


def cell(folder, meta, *, attention="performer", position="rope", model="decoder", seed=3):
    """The folder of one seed, as training leaves it, with weights that no seed gives."""
    names = {"attention": attention, "projection": "mha", "position": position, "model": model}
    config = OmegaConf.create({group: OmegaConf.load(CONF / group / f"{name}.yaml") for group, name in names.items()})
    config.model.width, config.seed = 16, seed
    built = build_model(config, meta, seed=seed)
    generator = torch.Generator().manual_seed(9)
    for weight in built.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    folder.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    save_model(built, str(folder / "model.safetensors"))
    return built.eval()


@pytest.fixture
def exported(tmp_path, prepared):
    data, meta = prepared
    cell(tmp_path / "cell", meta)
    export(tmp_path / "cell", data, tmp_path / "out")
    return tmp_path / "out"


def rewrite(folder, change):
    """Other tensors under a hash of their own, as someone who edits the file would leave it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_same_logits_to_the_bit_in_an_empty_folder(tmp_path, prepared):
    """In a process that sees the package and the moved folders only."""
    data, meta = prepared
    ids = torch.randint(16, (3, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16) < torch.tensor([16, 9, 4])[:, None]
    elsewhere, expected = tmp_path / "elsewhere", {}
    elsewhere.mkdir()
    for name, (attention, position, model) in CELLS.items():
        trained = cell(tmp_path / name, meta, attention=attention, position=position, model=model)
        expected[name] = trained(ids, key_padding_mask=mask)
        export(tmp_path / name, data, tmp_path / f"{name}-out")
        (tmp_path / f"{name}-out").rename(elsewhere / name)
    torch.save((ids, mask), elsewhere / "inputs.pt")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", ELSEWHERE, *CELLS]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, found in torch.load(elsewhere / "logits.pt").items():
        assert torch.equal(found, expected[name])
        assert found.std() > 0.1


def test_the_script_writes_what_loads(tmp_path, prepared):
    trained = cell(tmp_path / "cell", prepared[1])
    done = run("export.py", tmp_path, "cell=cell", f"prepared={prepared[0]}", "out=out", logger=False)
    assert done.returncode == 0, done.stderr
    assert "export cell: model.safetensors, tokenizer.json and config.json, in out" in done.stdout
    loaded = load_exported(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trained.state_dict().items())


def test_the_folder_holds_what_is_needed_and_no_path(exported, prepared):
    assert sorted(path.name for path in exported.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    text = (exported / "config.json").read_text()
    assert "/" not in text
    assert json.loads(text)["meta"]["vocabulary_size"] == prepared[1]["vocabulary_size"]


def test_a_longer_model_where_no_weight_depends_on_the_length(tmp_path, exported, prepared):
    ids = torch.randint(16, (1, 40), generator=torch.Generator().manual_seed(0))
    longer = load_exported(exported, max_length=40)
    torch.testing.assert_close(longer(ids)[:, :16], load_exported(exported)(ids[:, :16]))
    cell(tmp_path / "fixed", prepared[1], position="learned")
    export(tmp_path / "fixed", prepared[0], tmp_path / "table")
    with pytest.raises(ValueError, match=r"position.table \(16, 16\), not \(40, 16\).*leave out `max_length` 40"):
        load_exported(tmp_path / "table", max_length=40)


def test_missing_extra_and_misshapen_tensors_are_named(exported):
    rewrite(exported, lambda tensors: tensors.pop("embedding.weight"))
    with pytest.raises(ValueError, match=r"missing \['embedding.weight'\], left over \[\].*pipelines/export.py"):
        load_exported(exported)
    rewrite(exported, lambda tensors: tensors.update({"embedding.weight": torch.zeros(16, 16), "more": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"missing \[\], left over \['more'\].*pipelines/export.py"):
        load_exported(exported)
    rewrite(exported, lambda tensors: tensors.update({"embedding.weight": torch.zeros(7, 16)}))
    with pytest.raises(ValueError, match=r"embedding.weight \(7, 16\), not \(16, 16\).*pipelines/export.py"):
        load_exported(exported)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_file_cut_short_is_damaged(exported, keep):
    weights = exported / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors` is damaged.*copy the whole folder again"):
        load_exported(exported)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_changed_byte_is_found(exported, name):
    content = bytearray((exported / name).read_bytes())
    content[-2] ^= 1
    (exported / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}` is damaged: expected SHA-256"):
        load_exported(exported)


def test_a_config_that_is_cut_old_partial_or_foreign_is_refused(exported):
    path = exported / "config.json"
    whole = read_json(path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"config.json` is damaged.*copy the whole folder"):
        load_exported(exported)
    write_json(path, {**whole, "format": 7})
    with pytest.raises(ValueError, match=r"has format 7, and attnlens .* reads 1: install"):
        load_exported(exported)
    write_json(path, {name: value for name, value in whole.items() if name != "position"})
    with pytest.raises(ValueError, match=r"lacks \['position'\]"):
        load_exported(exported)
    write_json(path, {**whole, "attention": {"_target_": "subprocess.Popen", "args": "true"}})
    with pytest.raises(ValueError, match=r"wants to build \['subprocess.Popen'\]: pass `trusted`"):
        load_exported(exported)
    write_json(path, {**whole, "attention": {"_target_": "attnlens.attention.later.Later"}})
    with pytest.raises(ValueError, match=r"(?s)names a class that this attnlens .* written by version"):
        load_exported(exported)


def test_what_cannot_be_exported_is_refused(tmp_path, exported, prepared):
    with pytest.raises(ValueError, match=r"nothing/model.safetensors` is missing: train the cell"):
        export(tmp_path / "nothing", prepared[0], tmp_path / "new")
    with pytest.raises(ValueError, match="holds no prepared data"):
        export(tmp_path / "cell", tmp_path / "nothing", tmp_path / "new")
    with pytest.raises(ValueError, match=r"`out`.*exists and is no export"):
        export(tmp_path / "cell", prepared[0], tmp_path / "cell")
    (exported / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"out/model.safetensors` is missing: export the cell again"):
        load_exported(exported)
    export(tmp_path / "cell", prepared[0], exported)
    assert load_exported(exported).training is False
