"""Variances of whole sets of pairs: against the definition pair by pair, their order, and their record."""

import math

import pytest
import torch
from safetensors.torch import save_file

from attnlens.analysis.variance import FEATURES, summarize, variance, variances
from attnlens.linalg.random_features import positive_log_variance
from attnlens.study import Study

SETTINGS = {"head_dim": 16, "logit_scales": [0.1, 1.0], "seed": 0}


def tokens(scale, seed=0):
    q, k = torch.randn(2, 2, 20, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return q * scale**0.5, k * scale**0.5


def test_the_median_is_over_all_pairs_of_a_head():
    q, k = tokens(1.0)
    records = variances(q, k)
    for head, record in enumerate(records):
        squares = [(x / 2 + y / 2).square().sum() for x in q[head] for y in k[head]]
        expected = torch.stack([positive_log_variance(s) for s in squares]).median() / math.log(10)
        assert record["positive"] == pytest.approx(expected.item())
        assert record["logit_scale"] == pytest.approx((q[head] @ k[head].mT / 4).std().item())


def test_opposite_pairs_save_half_and_a_fit_saves_digits():
    record = variances(*tokens(2.0))[0]
    assert record["positive"] - record["hyperbolic"] == pytest.approx(math.log10(2), abs=0.01)
    assert record["favor_sharp"] < record["positive"] - 1


def test_values_that_leave_the_range_of_floats_stay_finite():
    assert all(math.isfinite(value) for value in variances(*tokens(400.0))[0].values())


def test_the_record_holds_the_ladder_and_every_trained_head(tmp_path):
    folder = tmp_path / "models/softmax/mqar/seed0"
    folder.mkdir(parents=True)
    q, k, v = torch.randn(3, 2, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    layers = {f"layer{i}.{name}": x.clone() for i in range(2) for name, x in zip("qkv", (q, k, v), strict=True)}
    save_file(layers, folder / "qkv.safetensors", metadata={"causal": "false"})
    study = Study((), ("mqar",), ("softmax",), "mha", 1, (0.5,), "softmax")
    result = variance(study, tmp_path, SETTINGS, progress=lambda message: None)
    assert [row["logit_scale"] for row in result["gaussian"]] == [0.1, 1.0]
    assert [(row["layer"], row["head"]) for row in result["reference"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert result["gaussian"][0]["positive"] < result["gaussian"][1]["positive"]
    assert set(summarize(result)) == {f"{name}/{scale}" for name in FEATURES for scale in ("0.1", "1")}
