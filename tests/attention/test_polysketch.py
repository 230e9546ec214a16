"""PolySketchFormer: its matrix form, exact blocks, weights that are not negative, the sign of the bias, learning."""

import itertools
import math

import pytest
import torch

from attnlens.analysis.budget import operator_flops
from attnlens.attention.polysketch import PolySketch
from attnlens.linalg.polynomial_kernel import kernel_values, scaled
from attnlens.linalg.polynomial_sketch import relative_variance
from attnlens.testing.inputs import gaussian

MASK = torch.arange(70) < torch.tensor([70, 31])[:, None]


def operator(num_features=6, degree=4, seed=0, head_dim=8, num_heads=2, **options):
    return PolySketch(num_features, degree, head_dim, num_heads, seed, **options).double()


def naive(op, q, k, v, *, causal, mask):
    """Squared inner products of sketches, replaced by the exact kernel within blocks where causal; materialized."""
    x, y = scaled(q, op.normalize), scaled(k, op.normalize)
    kernel = (op.sketch(x) @ op.sketch(y).mT).square()
    if causal:
        block = torch.arange(q.shape[2]) // op.block_size
        kernel = torch.where(block[:, None] == block, kernel_values(x, y, op.degree), kernel).tril()
    kernel = kernel if mask is None else torch.where(mask[:, None, None], kernel, 0)
    return kernel @ v / (1 + kernel.sum(-1, keepdim=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"degree": 8, "block_size": 16}, {"normalize": False, "block_size": 1}])
def test_sums_first_equal_the_matrix_form_forward_and_backward(options, causal):
    tensors = [x.requires_grad_() for x in gaussian(70, value_dim=5)]
    op = operator(**options)
    for mask in (None, MASK):
        found = op(*tensors, causal=causal, key_padding_mask=mask)
        expected = naive(op, *tensors, causal=causal, mask=mask)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)
        cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        pulled = [torch.autograd.grad((out * cotangent).sum(), tensors) for out in (found, expected)]
        for a, b in zip(*pulled, strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("normalize", [False, True])
def test_causal_is_exact_within_the_first_block(normalize):
    q, k, v = gaussian(70)
    op = operator(block_size=40, normalize=normalize)
    error = (op(q, k, v, causal=True) - op.reference(q, k, v, causal=True)).norm(dim=-1)
    assert (error[..., :40] < 1e-12).all()
    assert error[..., 40:].min() > 1e-3
    whole = operator(block_size=70, normalize=normalize)
    torch.testing.assert_close(whole(q, k, v, causal=True), whole.reference(q, k, v, causal=True))


@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_not_negative_and_leave_room_for_the_one(causal):
    q, k, _ = gaussian(70, logit_scale=3.0)
    weights = operator().matrix(q, k, causal=causal)
    assert (weights >= 0).all()
    assert (weights.sum(-1) < 1).all()


def test_the_kernel_is_biased_upward_by_at_most_the_variance():
    """Unbiased it is not, and not meant to be; for unit vectors the bias lies in [0, (1 + 8/r)^{p/2-1} - 1]."""
    draws, r = 3000, 8
    for degree in (4, 8):
        op = operator(r, degree, num_heads=draws)
        x, y = (torch.nn.functional.normalize(z[:1, :1, :6], dim=-1) for z in gaussian(6)[:2])
        y[:, :, 0] = x[:, :, 0]
        phi = [op.sketch(z.expand(-1, draws, -1, -1)) for z in (x, y)]
        excess = (phi[0] @ phi[1].mT)[0].square() - (x @ y.mT)[0, 0] ** degree
        error = excess.std(0) / draws**0.5
        assert (excess.mean(0) > -5 * error).all()
        overall = excess.mean((1, 2))
        assert overall.mean() > 5 * overall.std() / draws**0.5
        assert (excess.mean(0) < relative_variance(degree // 2, r) + 5 * error).all()


def test_more_features_lead_to_the_target():
    """At logit scale 1 the relative error is 1.0, 0.76 and 0.44 with 8, 32 and 128 features: the bias first."""
    q, k, v = gaussian(40)
    errors = []
    for r in (8, 32, 128):
        ops = [operator(r, seed=seed, normalize=False) for seed in range(8)]
        exact = ops[0].reference(q, k, v)
        errors.append(sum((op(q, k, v) - exact).square().mean().item() for op in ops) ** 0.5)
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.65 * errors[1]


def test_a_learned_sketch_starts_at_the_draw_and_learns():
    q, k, v = gaussian(30)
    fixed, learned = operator(), operator(learned=True)
    assert not list(fixed.parameters())
    torch.testing.assert_close(learned(q, k, v), fixed(q, k, v), atol=0, rtol=0)
    exact = learned.reference(q, k, v)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = (learned(q, k, v) - exact).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("causal", [False, True])
def test_cost_is_linear_in_the_length(causal):
    op = operator(16, head_dim=64)
    costs = [operator_flops(op, *gaussian(n, batch=1, head_dim=64), causal=causal) for n in (1024, 2048, 4096)]
    slopes = [math.log2(b / a) for a, b in itertools.pairwise(costs)]
    assert all(abs(slope - 1) < 0.03 for slope in slopes), slopes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "`num_features` must be at least 1, got 0"),
        ({"block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"degree": 6}, "`degree` must be a power of two and at least 4, got 6"),
        ({"degree": 2}, "`degree` must be a power of two and at least 4, got 2"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        operator(**options)
    with pytest.raises(ValueError, match="`num_heads`"):
        operator(num_heads=3)(*gaussian(4))
