"""Three maps of one kernel: the contract for each, moments by Monte Carlo, rows and scales."""

from functools import partial

import pytest
import torch

from attnlens.attention import build
from attnlens.linalg.feature_maps import Hyperbolic, Positive, Trigonometric
from attnlens.linalg.random_features import (
    hyperbolic_log_variance,
    positive_log_variance,
    trigonometric_log_variance,
)
from attnlens.testing import CONTRACT
from attnlens.testing.inputs import gaussian

MAPS = {"Positive": Positive, "Hyperbolic": Hyperbolic, "Trigonometric": Trigonometric}


def config(name, orthogonal=True, num_features=64):
    return {
        "_target_": "attnlens.attention.performer.Performer",
        "num_features": num_features,
        "orthogonal": orthogonal,
        "features": {"_target_": f"attnlens.linalg.feature_maps.{name}"},
    }


@pytest.mark.parametrize("name", ["Hyperbolic", "Trigonometric"])
def test_performer_keeps_the_contract_with_every_map(name):
    factory = partial(build, config(name))
    # Compilation takes a process without type checks: tests/attention/test_contract.py.
    found = {row: check(factory) or "passed" for row, check in CONTRACT.items() if row != "compilation"}
    assert found["unbiased"] == found["order"] == found["recurrence"] == "passed"
    assert (found["constant_values"] == "passed") == MAPS[name].row_stochastic


@pytest.mark.parametrize(("name", "of"), [("Positive", "sum"), ("Hyperbolic", "sum"), ("Trigonometric", "difference")])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_estimates_are_unbiased_and_independent_ones_have_the_variance_of_the_formula(name, of, orthogonal):
    draws, m, dim = 20_000, 4, 6
    generator = torch.Generator().manual_seed(1)
    x, y = 0.3 * torch.randn(2, 1, 1, 3, dim, generator=generator, dtype=torch.float64)
    operator = build(config(name, orthogonal, m * draws), head_dim=dim, num_heads=1, max_length=8, seed=3).double()
    w = operator.projections.view(1, draws, m, dim).expand(1, -1, -1, -1).double()
    features = [MAPS[name]().features(t.expand(-1, draws, -1, -1), w) for t in (x, y)]
    ratio = (features[0] @ features[1].mT)[0] / (x @ y.mT).exp()[0]
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / draws**0.5).all()
    if not orthogonal:
        logs = {"Positive": positive_log_variance, "Hyperbolic": hyperbolic_log_variance}
        sign = 1 if of == "sum" else -1
        square = (x[0, 0, :, None] + sign * y[0, 0, None]).square().sum(-1)
        expected = logs.get(name, trigonometric_log_variance)(square).exp() / m
        torch.testing.assert_close(ratio.var(0), expected, rtol=0.3, atol=0)


def test_log_variances_do_not_overflow_and_order_as_the_formulas_say():
    square = torch.tensor([1e-3, 0.5, 4.0, 1000.0], dtype=torch.float64)
    positive, hyperbolic = positive_log_variance(square), hyperbolic_log_variance(square)
    assert positive[-1] == 1000
    assert (hyperbolic < positive - 0.69).all()
    assert (trigonometric_log_variance(square) == hyperbolic).all(), "the same law, in |x - y|^2"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_hyperbolic_rows_sum_to_one_in_float32(scale, causal):
    q, k, _ = gaussian(150, head_dim=64, logit_scale=scale, dtype=torch.float32)
    operator = build(config("Hyperbolic"), head_dim=64, num_heads=2, max_length=150, seed=0)
    sums = operator.matrix(q, k, causal=causal).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_trigonometric_outputs_are_finite_and_follow_float64_at_large_scales(causal):
    """Keys carry e^{|y|^2/2}, up to e^40 here, without leaving the range of float32."""
    q, k, v = gaussian(100, head_dim=64, logit_scale=10.0)
    operator = build(config("Trigonometric"), head_dim=64, num_heads=2, max_length=100, seed=0)
    single = operator(q.float(), k.float(), v.float(), causal=causal)
    double = operator.double()(q, k, v, causal=causal)
    assert single.isfinite().all()
    assert (single - double).norm() < 1e-3 * double.norm()


def test_near_pairs_favor_trigonometric_and_opposite_ones_positive_features():
    """Exact at x = y and at x = -y respectively."""
    w = torch.randn(1, 1, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(1, 1, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    square = x.square().sum(-1)
    waves, exponentials = Trigonometric().features(x, w), (Positive().features(t, w) for t in (x, -x))
    torch.testing.assert_close(waves.square().sum(-1), square.exp())
    first, second = exponentials
    torch.testing.assert_close((first * second).sum(-1), (-square).exp())
