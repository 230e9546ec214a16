"""A study that trains in a fraction of a second: two prepared data sets in a temporary folder, and jobs on them."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from attnlens.data.mqar import MQAR
from attnlens.data.store import save
from attnlens.training.job import Job

CONF = Path(__file__).resolve().parents[2] / "conf"
TINY = ("model.width=16", "training.batch_size=8", "training.warmup_steps=5", "trainer=cpu", "logger=csv")
SIZES = {"vocabulary_size": 16, "test_num_pairs": [1, 2], "headline": 2, "power": 0.01, "num_validation": 20}


def prepare(root, name="mqar", **changes):
    sizes = {"length": 16, "num_pairs": [2], "num_train": 120, "num_test": 24, "causal": False, "seed": 0, **SIZES}
    return save(MQAR(**{**sizes, **changes}).prepare(root), root / "data" / "prepared" / name)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The current folder of a small study: `make(*overrides)` is a job in it."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    prepare(tmp_path)
    prepare(tmp_path, "mqar_causal", causal=True)

    def make(*overrides, data="mqar", attention="softmax", seed=0):
        names = [f"experiment={data}", f"attention={attention}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", [*names, *TINY, "training.steps=20", *overrides])
        resolved = OmegaConf.to_container(config, resolve=True)
        return Job(config=resolved, data=data, attention=attention, seed=seed, folder=f"outputs/{len(overrides)}")

    yield make
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
