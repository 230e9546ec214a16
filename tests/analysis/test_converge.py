"""Curves of error against budget: known orders are found, exact budgets carry no slope, every method gets an answer."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.converge import Ensemble, converge, ensemble, gaussian_inputs, summarize
from attnlens.attention import AbstractAttention
from attnlens.linalg.dense import softmax_naive

SMALL = Ensemble(
    length=16,
    head_dim=8,
    num_heads=2,
    logit_scales=(0.1, 1.0),
    arguments=(4, 8, 16, 32, 64),
    most=50.0,
    asymptotic=4,
    draws=6,
    seed=0,
)


class Noisy(AbstractAttention):
    """Softmax attention with an error that falls like size^-2, and not at all below 8, which it refuses."""

    family = "test"
    budget = "size"
    order = 2.0

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        if size < 8:
            raise ValueError(f"`size` must be at least 8, got {size}")
        self.size = size
        self.sign = 1 if seed % 2 else -1

    def attend(self, q, k, v, *, causal, key_padding_mask):
        exact = softmax_naive(q, k, v, causal=causal, key_padding_mask=key_padding_mask)
        return exact * (1 + self.sign * self.size**-2.0)


def run(target, on=SMALL, **arguments):
    return converge(OmegaConf.create({"_target_": target} | arguments), on, progress=lambda message: None)


def test_a_known_order_is_found_and_refused_arguments_are_left_out():
    result = run(f"{__name__}.Noisy", size=8)
    assert [p["argument"] for p in result["points"]] == [8, 16, 32, 64] * 2
    assert result["slope"]["slope"] == pytest.approx(-2, abs=1e-9)
    assert result["slope"]["of"] == "output"
    assert result["slope"]["standard_error"] == pytest.approx(0, abs=1e-6)
    for point in result["points"]:
        assert point["error"] == pytest.approx(point["argument"] ** -2.0)
        assert len(point["fitted_draws"]) == SMALL.draws


def test_the_slope_of_an_unbiased_method_is_that_of_its_kernel():
    on = SMALL._replace(draws=40)
    result = run("attnlens.attention.performer.Performer", on, num_features=8, orthogonal=False)
    slope = result["slope"]
    assert slope["of"] == "kernel"
    assert abs(slope["slope"] + 0.5) < 0.1
    assert 0 < slope["standard_error"] < 0.1
    assert all(p["error_min"] <= p["error"] <= p["error_max"] for p in result["points"])


def test_budgets_where_a_method_is_exact_carry_no_slope():
    result = run("attnlens.attention.window.Window", window=4)
    exact = [p for p in result["points"] if p["argument"] >= SMALL.length]
    assert exact
    assert all(p["error"] < 1e-9 for p in exact)
    assert result["slope"] is None
    assert summarize(result).keys() == {"error/0.1", "error/1"}


def test_costs_beyond_the_limit_are_not_tried():
    free = run("attnlens.attention.performer.Performer", num_features=8)
    limited = run("attnlens.attention.performer.Performer", SMALL._replace(most=2.0), num_features=8)
    assert max(p["achieved"] for p in limited["points"]) <= 2 < max(p["achieved"] for p in free["points"])


def test_the_null_is_the_error_of_the_mean_value():
    result = run(f"{__name__}.Noisy", size=8)
    for entry in result["null"]:
        q, k, v = gaussian_inputs(SMALL, entry["logit_scale"])
        exact = softmax_naive(q, k, v, causal=False, key_padding_mask=None)
        assert entry["error"] == pytest.approx(((v.mean(2, keepdim=True) - exact).norm() / exact.norm()).item())


def test_logits_have_the_scale_asked_for():
    on = SMALL._replace(length=256, head_dim=64)
    q, k, _ = gaussian_inputs(on, 3.0)
    assert (q @ k.mT / 8).std().item() == pytest.approx(3, rel=0.05)
    assert torch.allclose(gaussian_inputs(on, 0.3)[0], q * 0.1**0.5)


@pytest.mark.parametrize(
    ("target", "arguments", "reason"),
    [
        ("attnlens.attention.softmax.Softmax", {}, "no budget"),
        (
            "attnlens.attention.linformer.Linformer",
            {"num_keys": 4, "projection": {"_target_": "attnlens.linalg.length_projection.Learned"}},
            "learned",
        ),
    ],
)
def test_a_method_without_a_curve_says_why(target, arguments, reason):
    result = run(target, **arguments)
    assert reason in result["reason"]
    assert result["points"] == []
    assert result["slope"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"draws": 0}, "draws"), ({"arguments": [8, 4]}, "arguments"), ({"logit_scales": []}, "logit_scales")],
)
def test_settings_that_measure_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ensemble(SMALL._asdict() | change)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="analysis"):
        ensemble(SMALL._asdict() | {"drws": 3})
