"""A cell of the study on captures made of random tensors: every number against what it must be."""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from attnlens.analysis.approximate import Cell, approximate, summarize
from attnlens.analysis.capture import capture, read_captures
from attnlens.analysis.measure import measure
from attnlens.attention import AbstractAttention
from attnlens.attention.mean import Mean
from attnlens.attention.random_keys import RandomKeys
from attnlens.attention.softmax import Softmax

from .cells import BATCH, DIM, HEADS, LAYERS, LENGTH, STUDY, qkv, write_cell, write_refusal


class Scaled(AbstractAttention):
    """A learned operator: softmax times a trained factor."""

    family = "test"
    budget = "size"

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.size = size
        self.factor = nn.Parameter(torch.tensor(1.0))

    def attend(self, q, k, v, *, causal, key_padding_mask):
        return self.factor * Softmax()(q, k, v, causal=causal, key_padding_mask=key_padding_mask)


class Bidirectional(Mean):
    """An operator that cannot be causal."""

    causal = False


def config(target, **arguments):
    return OmegaConf.create({"_target_": target} | arguments)


RANDOM_KEYS = "attnlens.attention.random_keys.RandomKeys"


def cell(root, target, name="toy", draws=3, study=STUDY, **arguments):
    return Cell(name, config(target, **arguments), study, root, draws)


def silent(message):
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for data, causal in {"mqar": False, "shakespeare": True}.items():
        write_cell(folder, "softmax", data, causal=causal)
        write_cell(folder, "toy", data, causal=causal)
    return folder


@pytest.fixture(scope="module")
def random_keys(root):
    return approximate(cell(root, RANDOM_KEYS, num_keys=16), silent)


def test_every_combination_has_one_row(random_keys):
    keys = [tuple(row[k] for k in ("data", "source", "seed", "layer", "head", "budget")) for row in random_keys["rows"]]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 * LAYERS * HEADS * len(STUDY.budgets)
    trained = random_keys["trained"]
    assert len(trained) == 2 * 2 * LAYERS * HEADS
    assert {(row["source"], row["budget"], row["argument"]["num_keys"]) for row in trained} == {("own", None, 16)}


def test_the_result_is_plain_and_repeats(root):
    study = STUDY._replace(seeds=1, budgets=(0.25,))
    texts = [
        json.dumps(approximate(cell(root, RANDOM_KEYS, study=study, num_keys=16), silent), allow_nan=False)
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_achieved_costs_follow_the_ladder(random_keys):
    for row in random_keys["rows"]:
        assert row["achieved"] == row["flops"] / row["exact_flops"]
        assert row["reachable"] == (abs(row["achieved"] / row["budget"] - 1) <= 0.1)
    assert sum(row["reachable"] for row in random_keys["rows"]) > 0.7 * len(random_keys["rows"])


def test_more_budget_is_less_error(random_keys):
    means = summarize(random_keys)
    for data in STUDY.data:
        for source in ("own", "reference"):
            errors = [means[f"{data}/{source}/{budget}/error"] for budget in STUDY.budgets]
            assert errors == sorted(errors, reverse=True)


def test_oracles_bound_what_they_bound(random_keys):
    """Selected keys with exact weights, renormalized: top-k of as many keys has less total variation."""
    for row in random_keys["rows"]:
        assert row["draws"] == 3
        assert row["error_std"] > 0
        assert row["row_sum_defect"] < 1e-5
        assert row["negative_mass"] == 0
        if row["k"] > 0:
            assert 0 < row["optimality_top_k"] < 1
        assert row["error_target"] == row["error"]
        assert row["skill"] == pytest.approx(row["error"] / row["error_mean_v"])


def test_softmax_is_exact_and_measured_once_for_both_sources(root):
    result = approximate(cell(root, "attnlens.attention.softmax.Softmax", name="softmax"), silent)
    assert len(result["rows"]) == 2 * 2 * 2 * LAYERS * HEADS
    for row in result["rows"]:
        assert row["budget"] is None
        assert row["argument"] == {}
        assert row["achieved"] == 1
        assert row["error"] < 1e-6
        assert row["skill"] < 1e-6
        assert row["visited"] == 1
        assert row["optimality_low_rank"] is None
    own, reference = ([r for r in result["rows"] if r["source"] == s] for s in ("own", "reference"))
    assert [r | {"source": ""} for r in own] == [r | {"source": ""} for r in reference]


def test_mean_has_skill_one(root):
    result = approximate(cell(root, "attnlens.attention.mean.Mean"), silent)
    assert result["target"] == "itself"
    for row in result["rows"]:
        assert row["skill"] == pytest.approx(1, rel=1e-4)
        assert row["error_target"] < 1e-5
        assert row["kl"] > 0


def test_a_bidirectional_operator_is_not_applicable_to_causal_data(tmp_path, root):
    write_cell(tmp_path, "softmax", "mqar", causal=False)
    write_cell(tmp_path, "softmax", "shakespeare", causal=True)
    write_cell(tmp_path, "toy", "mqar", causal=False)
    write_refusal(tmp_path, "toy", "shakespeare", "its mathematics reads all tokens")
    result = approximate(cell(tmp_path, f"{__name__}.Bidirectional"), silent)
    assert result["not_applicable"] == [{"data": "shakespeare", "reason": "its mathematics reads all tokens"}]
    assert {row["data"] for row in result["rows"]} == {"mqar"}


def test_a_missing_model_names_its_command(tmp_path):
    with pytest.raises(ValueError, match="dvc repro train@mqar-toy"):
        approximate(cell(tmp_path, "attnlens.attention.mean.Mean"), silent)


def test_no_draws_are_refused(root):
    with pytest.raises(ValueError, match="`draws` must be at least 1, got 0"):
        approximate(cell(root, RANDOM_KEYS, draws=0, num_keys=16), silent)


def test_a_learned_operator_keeps_its_weights_and_budget(tmp_path):
    study = STUDY._replace(data=("mqar",), seeds=1)
    weights = {f"blocks.{i}.projection.attention.factor": torch.tensor(1.0 + 0.5 * i) for i in range(LAYERS)}
    write_cell(tmp_path, "softmax", "mqar", causal=False, seeds=1)
    write_cell(tmp_path, "toy", "mqar", causal=False, seeds=1, weights=weights)
    result = approximate(cell(tmp_path, f"{__name__}.Scaled", study=study, size=8), silent)
    assert result["budget_argument"] is None
    assert {row["budget"] for row in result["rows"]} == {None}
    for row in result["rows"] + result["trained"]:
        assert row["error"] == pytest.approx(0.5 * row["layer"], abs=1e-5)
    assert {row["argument"]["size"] for row in result["trained"]} == {8}


def test_weights_that_lack_a_parameter_are_refused(tmp_path):
    study = STUDY._replace(data=("mqar",), seeds=1)
    write_cell(tmp_path, "softmax", "mqar", causal=False, seeds=1)
    write_cell(tmp_path, "toy", "mqar", causal=False, seeds=1)
    with pytest.raises(ValueError, match=r"lacks blocks\.0\.projection\.attention\.\['factor'\]"):
        approximate(cell(tmp_path, f"{__name__}.Scaled", study=study, size=8), silent)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_no_number(causal):
    """An example padded with NaN measures as the short one does."""
    q, k, v = torch.randn(3, 1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(20)[None] < 13
    short = capture(0, q[:, :, :13], k[:, :, :13], v[:, :, :13], causal=causal)
    holes = (torch.where(mask[:, None, :, None], x, torch.nan) for x in (q, k, v))
    padded = capture(0, *holes, causal=causal, key_padding_mask=mask)
    for operator in (Mean(), Softmax()):
        flops = 30_000
        for one, two in zip(measure([operator], short, flops), measure([operator], padded, flops), strict=True):
            for name in one:
                assert (one[name] is None) == (two[name] is None), name
                assert one[name] is None or one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-6), name


def test_draws_are_averaged():
    tensors = qkv(0, causal=False)
    layer = capture(0, *(tensors[f"layer0.{x}"] for x in "qkv"), causal=False)
    operators = [RandomKeys(8, max_length=LENGTH, seed=seed) for seed in range(4)]
    alone = [measure([operator], layer, 10_000)[0]["error"] for operator in operators]
    together = measure(operators, layer, 10_000)[0]
    mean = sum(alone) / 4
    assert together["error"] == pytest.approx(mean)
    assert together["error_std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in alone) / 3))


def test_captures_are_read_as_they_were_written(tmp_path):
    save_file(qkv(3, True, padded=True), tmp_path / "qkv.safetensors", metadata={"causal": "true"})
    layers = read_captures(tmp_path / "qkv.safetensors")
    assert [layer.layer for layer in layers] == list(range(LAYERS))
    assert layers[0].q.shape == (BATCH, HEADS, LENGTH, DIM)
    assert layers[0].causal
    assert layers[0].key_padding_mask.sum(1).tolist() == [64, 57, 32, 3]


def test_a_capture_that_does_not_say_whether_it_is_causal_is_refused(tmp_path):
    save_file(qkv(3, True), tmp_path / "qkv.safetensors")
    with pytest.raises(ValueError, match="is no capture"):
        read_captures(tmp_path / "qkv.safetensors")


@pytest.mark.parametrize("target", ["third_order.ThirdOrder", "tensorized.Tensorized"])
def test_an_operator_without_a_matrix_is_not_compared_with_exact_attention(root, target):
    """Its keys come in pairs, or its values are mixed: there is no P to hold against softmax attention's."""
    result = approximate(cell(root, f"attnlens.attention.{target}"), silent)
    assert result["rows"] == result["trained"] == []
    assert [entry["data"] for entry in result["not_applicable"]] == ["mqar", "shakespeare"]
    assert all("no matrix of queries by keys" in entry["reason"] for entry in result["not_applicable"])
