"""The angular hybrid as attention: its matrix form, range, exact pairs, held rows, the state and the cost."""

import itertools
import math

import pytest
import torch

from attnlens.analysis.budget import operator_flops
from attnlens.attention.hybrid_features import HybridFeatures
from attnlens.testing.inputs import gaussian

MASK = torch.arange(70) < torch.tensor([70, 31])[:, None]


def operator(num_features=8, num_planes=2, seed=0, head_dim=8, num_heads=2, **options):
    return HybridFeatures(num_features, num_planes, head_dim, num_heads, seed, **options).double()


def held(kernel, v, floor, seen):
    """What a row sum lacks to the floor is spread over all its keys."""
    mass = kernel.sum(-1, keepdim=True)
    spread = seen / seen.sum(-1, keepdim=True) * (floor - mass).clamp_min(0)
    return (kernel + spread) @ v / mass.maximum(floor)


def naive(op, q, k, v, *, causal, mask):
    """From both estimates and the share of planes that separate a pair, without features or scales."""
    x, y = q * 8**-0.25, k * 8**-0.25
    w, u = op.projections, op.planes
    share = 0.5 - (x @ u.mT).sign() @ (y @ u.mT).sign().mT / (2 * u.shape[1])
    half = [z.square().sum(-1, keepdim=True) / 2 for z in (x, y)]
    positive = (x @ w.mT - half[0]).exp() @ (y @ w.mT - half[1]).exp().mT / w.shape[1]
    waves = [torch.cat([(z @ w.mT).sin(), (z @ w.mT).cos()], -1) * h.exp() for z, h in zip((x, y), half, strict=True)]
    kernel = share * positive + (1 - share) * (waves[0] @ waves[1].mT / w.shape[1])
    seen = torch.ones_like(kernel) if mask is None else mask[:, None, None].expand(kernel.shape).to(v)
    seen = seen.tril() if causal else seen
    f_x, f_y = op._features(q, k)
    f_x, f_y = (f.values * f.log_scale.exp()[..., None] for f in (f_x, f_y))
    energy = seen @ f_y.square().sum(-1, keepdim=True)
    spread = (seen @ f_y).norm(dim=-1, keepdim=True).maximum(energy.sqrt())
    floor = f_x.norm(dim=-1, keepdim=True) * spread / f_x.shape[-1] ** 0.5
    return held(kernel * seen, v, 3 * floor, seen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_planes": 1, "orthogonal": False}])
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


def test_the_error_falls_with_the_features_at_any_number_of_planes():
    q, k, v = gaussian(24, logit_scale=0.3)
    for num_planes in (1, 8):
        errors = []
        for m in (16, 256):
            ops = [operator(m, num_planes, seed) for seed in range(20)]
            squares = [(op(q, k, v) - op.reference(q, k, v)).square().mean() for op in ops]
            errors.append(torch.stack(squares).mean().sqrt().item())
        assert math.log(errors[0] / errors[1], 16) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_rows_add_up_to_one_and_are_finite_in_float32(scale, causal):
    """At logit scale 100 and d = 64 a key has features of e^400."""
    q, k, v = (x.float() for x in gaussian(70, logit_scale=scale, head_dim=64))
    op = operator(32, head_dim=64).float()
    sums = op.matrix(q, k, causal=causal).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=2e-5, rtol=0)
    assert 0.02 < op.held(q, k, causal=causal).double().mean() < 0.999
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = op(*tensors, causal=causal)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("num_planes", [1, 3])
def test_opposite_pairs_are_exact_in_float32_too(num_planes):
    """Written with products of signs, the trigonometric part cancels to its round-off: e^24 times a kernel of e^-24."""
    k = gaussian(5, logit_scale=3.0, head_dim=64)[1].float()
    kernel = operator(num_planes=num_planes, head_dim=64).float().kernel(-k, k).diagonal(dim1=-2, dim2=-1)
    assert kernel.max() < 1e-6
    torch.testing.assert_close(kernel, (-k.square().sum(-1) / 8).exp(), rtol=1e-4, atol=0)


def test_a_huge_future_key_does_not_reach_back():
    """A scale common to all keys lets the future in through underflow."""
    q, k, v = (x.float() for x in gaussian(70))
    op = operator().float()
    before = op(q, k, v, causal=True)
    for t in (0, 20, 68):
        later = torch.arange(70)[:, None] > t
        after = op(torch.where(later, 50 * q, q), torch.where(later, 50 * k, k), v, causal=True)
        torch.testing.assert_close(after[:, :, : t + 1], before[:, :, : t + 1], atol=1e-5, rtol=1e-5)


def test_state_is_six_coordinates_a_frequency_and_plane_by_the_values_and_one():
    op = operator(num_features=5, num_planes=3)
    q, k, v = gaussian(40, value_dim=5)
    state = op.init_state(2, 2, 8, 5, q)
    assert state.moment[0, 0].numel() == 6 * 5 * 3 * (5 + 1)
    assert state.energy[0, 0].numel() == state.top[0, 0].numel() == 1
    assert sum(x[0, 0].numel() for x in state) == (6 * 5 * 3 + 1) * (5 + 1) + 2
    state, _ = op.step(state, q, k, v)
    f_y, log_scale = op._features(q, k)[1]
    sums = (f_y * log_scale.exp()[..., None]).sum(2)
    torch.testing.assert_close(state.moment[..., -1] * state.top.exp()[..., None], sums, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_cost_is_linear_in_the_length(causal):
    op = operator(16, 1, head_dim=64)
    costs = [operator_flops(op, *gaussian(n, batch=1, head_dim=64), causal=causal) for n in (1024, 2048, 4096)]
    slopes = [math.log2(b / a) for a, b in itertools.pairwise(costs)]
    assert all(abs(slope - 1) < 0.03 for slope in slopes), slopes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "`num_features` must be at least 1, got 0"),
        ({"num_planes": 0}, "`num_planes` must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        operator(**options)
    with pytest.raises(ValueError, match="`num_heads`"):
        operator(num_heads=3)(*gaussian(4))
