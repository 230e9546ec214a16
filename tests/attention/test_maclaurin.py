"""Random Maclaurin attention: its matrix form, exact low degrees, held rows, range, the state and the cost."""

import itertools
import math

import pytest
import torch

from attnlens.analysis.budget import operator_flops
from attnlens.attention.maclaurin import Maclaurin
from attnlens.testing.inputs import gaussian

MASK = torch.arange(70) < torch.tensor([70, 31])[:, None]


def operator(num_features=16, seed=0, head_dim=8, num_heads=2, exact_linear=False, **options):
    return Maclaurin(num_features, head_dim, num_heads, seed, exact_linear=exact_linear, **options).double()


def held(kernel, v, floor, seen):
    """What a row sum lacks to the floor is spread over all its keys."""
    mass = kernel.sum(-1, keepdim=True)
    spread = seen / seen.sum(-1, keepdim=True) * (floor - mass).clamp_min(0)
    return (kernel + spread) @ v / mass.maximum(floor)


def naive(op, q, k, v, *, causal, mask):
    """From the materialized kernel estimate."""
    kernel, f_x, f_y = op.kernel(q, k), op.features(q), op.features(k)
    exact = 9 if op.exact_linear else 0
    seen = torch.ones_like(kernel) if mask is None else mask[:, None, None].expand(kernel.shape).to(v)
    seen = seen.tril() if causal else seen
    kernel = torch.where(seen > 0, kernel, 0)
    total = seen @ (f_y if mask is None else torch.where(mask[:, None, :, None], f_y, 0))
    energy = (seen * f_y[..., exact:].square().sum(-1)[:, :, None]).sum(-1, keepdim=True)
    spread = total[..., exact:].norm(dim=-1, keepdim=True).maximum(energy.sqrt())
    floor = f_x[..., exact:].norm(dim=-1, keepdim=True) * spread * 3 / 4
    return held(kernel, v, floor, seen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"radius": 1.5}, {"exact_linear": True}])
def test_sums_first_equal_the_matrix_form_forward_and_backward(options, causal):
    tensors = [x.requires_grad_() for x in gaussian(70, value_dim=5)]
    op = operator(**options)
    for mask in (None, MASK):
        found = op(*tensors, causal=causal, key_padding_mask=mask)
        expected = naive(op, *tensors, causal=causal, mask=mask)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-8)
        cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        pulled = [torch.autograd.grad((out * cotangent).sum(), tensors) for out in (found, expected)]
        for a, b in zip(*pulled, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("options", [{"radius": 1.5}, {"exact_linear": True}, {"exact_linear": True, "radius": 1.2}])
def test_every_choice_of_degrees_is_unbiased(options):
    q, k, _ = gaussian(6, batch=1, logit_scale=0.5)
    heads = 4000
    op = operator(num_heads=heads, **options)
    found = op.kernel(*(x[:, :1].expand(-1, heads, -1, -1) for x in (q, k)))[0]
    error = (found.mean(0) - op.kernel_target(q[:, :1], k[:, :1])[0, 0]).abs()
    assert (error <= 5 * found.std(0) / heads**0.5).all()


def test_exact_low_degrees_leave_little_noise_at_small_logits():
    """What is left is of the size of the square of the logits: at a tenth of the scale a hundredth of the error, where
    drawn low degrees leave an error in proportion to the logits."""
    errors = {}
    for exact in (False, True):
        for scale in (0.1, 0.01):
            q, k, v = gaussian(24, logit_scale=scale)
            ops = [operator(64, seed=seed, exact_linear=exact) for seed in range(20)]
            squares = [(op(q, k, v) - op.reference(q, k, v)).square().mean() for op in ops]
            errors[exact, scale] = torch.stack(squares).mean().sqrt().item()
    assert errors[True, 0.1] < 0.3 * errors[False, 0.1]
    assert math.log10(errors[True, 0.1] / errors[True, 0.01]) == pytest.approx(2, abs=0.15)
    assert math.log10(errors[False, 0.1] / errors[False, 0.01]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_rows_add_up_to_one_and_are_finite_in_float32(scale, causal):
    """At logit scale 100 and d = 64 plain sums of products overflow with degrees around 16."""
    q, k, v = (x.float() for x in gaussian(70, logit_scale=scale, head_dim=64))
    op = operator(64, head_dim=64, radius=4.0 if scale == 100 else None).float()
    sums = op.matrix(q, k, causal=causal).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=2e-5, rtol=0)
    assert 0.02 < op.held(q, k, causal=causal).double().mean() < 0.999
    assert op.kernel(q, k).isfinite().all() == (scale < 100)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = op(*tensors, causal=causal)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), tensors))


def test_state_is_the_features_by_the_values_and_one():
    q, k, v = gaussian(40, value_dim=5)
    for exact in (False, True):
        op = operator(num_features=24, exact_linear=exact)
        state = op.init_state(2, 2, 8, 5, q)
        assert state.moment[0, 0].numel() == (24 + 9 * exact) * (5 + 1)
        assert state.energy[0, 0].numel() == state.top[0, 0].numel() == 1
        assert sum(x[0, 0].numel() for x in state) == (24 + 9 * exact + 1) * (5 + 1) + 2
        state, _ = op.step(state, q, k, v)
        sums = op.features(k).sum(2)
        torch.testing.assert_close(state.moment[..., -1] * state.top.exp()[..., None], sums, atol=1e-9, rtol=1e-9)


def test_factors_are_as_many_as_degrees_ask_for():
    """Geometric degrees have mean 1: about m products of length d, not m times the largest degree."""
    assert sum(operator(64).widths) < 64 + 24
    assert sum(operator(64, radius=2.0).widths) < 4 * 64 + 24


@pytest.mark.parametrize("causal", [False, True])
def test_cost_is_linear_in_the_length(causal):
    op = operator(64, head_dim=64)
    costs = [operator_flops(op, *gaussian(n, batch=1, head_dim=64), causal=causal) for n in (1024, 2048, 4096)]
    slopes = [math.log2(b / a) for a, b in itertools.pairwise(costs)]
    assert all(abs(slope - 1) < 0.03 for slope in slopes), slopes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "`num_features` must be at least 1, got 0"),
        ({"radius": 0.0}, "`radius` must be positive, got 0.0"),
        ({"max_degree": 1, "exact_linear": True}, "`max_degree` must be 2 to 32, got 1"),
        ({"max_degree": 33}, "`max_degree` must be 1 to 32, got 33"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        operator(**options)
    with pytest.raises(ValueError, match="`num_heads`"):
        operator(num_heads=3)(*gaussian(4))
