"""Monomials separate the two tokens: against the pairs, the relative error of the series, the bound, the state."""

import math
from itertools import pairwise

import pytest
import torch

from attnlens.analysis.flops import measure_flops
from attnlens.attention.third_order import ThirdOrder
from attnlens.attention.third_order_taylor import ThirdOrderTaylor, log_ratio
from attnlens.linalg.monomials import num_monomials
from attnlens.testing.inputs import gaussian


def _logits(q, k):
    return torch.einsum("bhnd,bhjd,bhkd->bhnjk", q, *k.chunk(2, -1)) / q.shape[-1] ** 0.5


def _series(x, degree):
    return sum(x**r / math.factorial(r) for r in range(degree + 1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("length", [1, 18, 33])
def test_equals_the_series_over_all_pairs_forward_and_backward(length, degree, causal):
    inputs = [x.requires_grad_() for x in gaussian(length, head_dim=4, value_dim=3, arity=2)]
    q, k, v = inputs
    mask = torch.arange(length) < torch.tensor([length, max(1, length // 2)])[:, None]
    operator = ThirdOrderTaylor(degree, 4)
    for padding in (None, mask):
        real = torch.ones_like(mask) if padding is None else padding
        seen = real[:, None, None, :].expand(-1, 2, length, -1)
        seen = seen.tril() if causal else seen
        weights = _series(_logits(q, k), degree) * (seen[..., None] & seen[..., None, :])
        weights = weights / weights.sum((-2, -1), keepdim=True)
        exact = torch.einsum("bhnjk,bhjd,bhkd->bhnd", weights, *v.chunk(2, -1))
        found = operator(q, k, v, causal=causal, key_padding_mask=padding)
        torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-11)
        expected = torch.autograd.grad(exact.square().sum(), inputs, retain_graph=True)
        for a, b in zip(torch.autograd.grad(found.square().sum(), inputs), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("degree", [2, 4, 6])
def test_the_relative_error_of_a_weight_is_below_the_remainder(degree):
    """e^x x^{p+1}/(p+1)! with x the largest |logit|; and the logarithm of the ratio decreases, as the bound needs."""
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    size = x.abs()
    relative = (_series(x, degree) / x.exp() - 1).abs()
    assert (relative <= size.exp() * size ** (degree + 1) / math.factorial(degree + 1) + 1e-13).all()
    assert (log_ratio(x, degree).diff() <= 1e-15).all()
    assert (_series(x, degree) > 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_error_is_within_the_bound_and_the_bound_tells_something(scale, causal):
    for seed in range(3):
        q, k, v = gaussian(16, head_dim=4, arity=2, logit_scale=scale, seed=seed)
        operator = ThirdOrderTaylor(4, 4)
        error = (operator(q, k, v, causal=causal) - ThirdOrder()(q, k, v, causal=causal)).norm(dim=-1)
        bound = operator.error_bound(q, k, v, causal=causal)
        assert (error <= bound + 1e-12).all()
        if scale == 0.1:
            assert bound.median() < 1e-3
    assert bound.max() < 100


def test_the_error_falls_like_the_first_power_of_the_logits_that_is_left_out():
    errors = []
    for scale in (0.02, 0.04, 0.08):
        q, k, v = gaussian(12, head_dim=4, arity=2, logit_scale=scale)
        errors.append((ThirdOrderTaylor(2, 4)(q, k, v) - ThirdOrder()(q, k, v)).norm().log2().item())
    assert all(abs(b - a - 3) < 0.2 for a, b in pairwise(errors))


def test_cost_and_state_are_those_of_the_monomials():
    flops = []
    for length in (512, 1024):
        inputs = gaussian(length, batch=1, arity=2, dtype=torch.float32)
        flops.append(measure_flops(lambda *x: ThirdOrderTaylor(2, 8)(*x), *inputs).flops)
    assert 0.95 < math.log2(flops[1] / flops[0]) < 1.02
    state = ThirdOrderTaylor(2, 8).init_state(1, 1, 8, 5, torch.zeros(1))
    assert sum(x.numel() for x in state) == 2 * num_monomials(8, 2) * 6


@pytest.mark.parametrize(
    ("degree", "dim", "message"),
    [
        (3, 8, "must be even and at least 2, got 3"),
        (0, 8, "got 0"),
        (4, 64, "has 814385 monomials, more than 200000"),
    ],
)
def test_degrees_that_are_refused(degree, dim, message):
    with pytest.raises(ValueError, match=message):
        ThirdOrderTaylor(degree, dim)


def test_heads_of_another_width_are_refused():
    q, k, v = gaussian(4, head_dim=8, arity=2)
    with pytest.raises(ValueError, match="heads of 8, but the monomials are of 4"):
        ThirdOrderTaylor(2, 4)(q, k, v)
