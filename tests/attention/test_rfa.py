"""Random feature attention: its matrix form, its target, the bound, the held rows, the state and the cost."""

import itertools
import math

import pytest
import torch

from attnlens.analysis.budget import operator_flops
from attnlens.attention.rfa import Rfa
from attnlens.testing.inputs import gaussian

MASK = torch.arange(70) < torch.tensor([70, 31])[:, None]


def operator(num_features=16, sigma=0.5, seed=0, head_dim=8, num_heads=2, **options):
    return Rfa(num_features, sigma, head_dim, num_heads, seed, **options).double()


def held(kernel, v, floor, seen):
    """What a row sum lacks to the floor is spread over all its keys."""
    mass = kernel.sum(-1, keepdim=True)
    spread = seen / seen.sum(-1, keepdim=True) * (floor - mass).clamp_min(0)
    return (kernel + spread) @ v / mass.maximum(floor)


def naive(op, q, k, v, *, causal, mask):
    """From the materialized cosines, frequency by frequency."""
    m = op.projections.shape[1]
    w = op.projections / op.log_sigma.exp()[:, None, None]
    x, y = (w @ (z / z.norm(dim=-1, keepdim=True)).mT for z in (q, k))
    kernel = torch.cos(x[..., :, None] - y[..., None, :]).mean(2)
    seen = torch.ones_like(kernel) if mask is None else mask[:, None, None].expand(kernel.shape).to(v)
    seen = seen.tril() if causal else seen
    phi = torch.cat([y.sin(), y.cos()], 2).mT * m**-0.5
    spread = (seen @ phi).norm(dim=-1, keepdim=True).maximum(seen.sum(-1, keepdim=True).sqrt())
    floor = 3 * spread / (2 * m) ** 0.5
    return held(kernel * seen, v, floor, seen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"sigma": 0.3, "orthogonal": False}, {"learned": True, "num_features": 5}])
def test_sums_first_equal_the_matrix_form_forward_and_backward(options, causal):
    tensors = [x.requires_grad_() for x in gaussian(70, value_dim=5)]
    op = operator(**options)
    for mask in (None, MASK):
        found = op(*tensors, causal=causal, key_padding_mask=mask)
        expected = naive(op, *tensors, causal=causal, mask=mask)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)
        cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        leaves = [*tensors, *op.parameters()]
        pulled = [torch.autograd.grad((out * cotangent).sum(), leaves) for out in (found, expected)]
        for a, b in zip(*pulled, strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_the_target_is_softmax_of_unit_vectors_at_temperature_sigma_squared(causal):
    q, k, v = gaussian(12, value_dim=5)
    op = operator(sigma=0.6)
    scores = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1) / 0.36
    scores = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf) if causal else scores
    torch.testing.assert_close(op.reference(q, k, v, causal=causal), torch.softmax(scores, -1) @ v)
    far = operator(4096, sigma=0.6)(q, k, v, causal=causal) - op.reference(q, k, v, causal=causal)
    assert far.norm() < 0.1 * v.norm()


def test_lengths_of_queries_and_keys_have_no_effect_and_nothing_overflows():
    q, k, v = (x.float() for x in gaussian(40))
    op = operator().float()
    factors = torch.logspace(-8, 8, 40)[:, None]
    torch.testing.assert_close(op(q * factors, k / factors, v), op(q, k, v), atol=1e-4, rtol=1e-3)
    assert op(q, torch.zeros_like(k), v).isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_the_bound_holds_falls_like_the_square_root_and_is_withdrawn_for_orthogonal_draws(causal):
    q, k, v = gaussian(24)
    errors, bounds = [], []
    for m in (64, 4096):
        ops = [operator(m, 1.0, seed=seed, orthogonal=False) for seed in range(10)]
        exact = ops[0].reference(q, k, v, causal=causal)
        errors.append(torch.stack([(op(q, k, v, causal=causal) - exact).norm(dim=-1) for op in ops]))
        bounds.append(ops[0].error_bound(q, k, v, causal=causal))
        assert (errors[-1] <= bounds[-1]).double().mean() >= 0.9
    assert bounds[1].median() < 0.2 * bounds[0].median()
    assert bounds[1].median() < 20 * errors[1].median()
    assert operator().error_bound(q, k, v) is None


def test_all_rows_add_up_to_one_and_noisy_ones_are_held():
    """At sigma = 0.6 opposite pairs have kernel values of e^-5.6 under a noise of (2m)^-1/2. At 1 no row is held."""
    q, k, _ = gaussian(70)
    for sigma, low, high in ((0.6, 0.05, 0.95), (1.0, 0.0, 0.0)):
        op = operator(64, sigma)
        sums = op.matrix(q, k).sum(-1)
        assert low <= op.held(q, k).double().mean() <= high
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_learned_sigma_is_one_number_a_head_and_acts_like_a_given_one():
    q, k, v = gaussian(10)
    op = operator(sigma=1.0, learned=True)
    assert [(name, x.shape) for name, x in op.named_parameters()] == [("log_sigma", (2,))]
    with torch.no_grad():
        op.log_sigma[1] = math.log(0.4)
    for head, sigma in enumerate((1.0, 0.4)):
        given = operator(sigma=sigma)
        for found, expected in (
            (op(q, k, v), given(q, k, v)),
            (op.reference(q, k, v), given.reference(q, k, v)),
            (op.kernel_target(q, k), given.kernel_target(q, k)),
        ):
            torch.testing.assert_close(found[:, head], expected[:, head], atol=1e-6, rtol=1e-6)


def test_state_is_two_coordinates_a_frequency_by_the_values_and_one():
    op = operator(num_features=24)
    q, k, v = gaussian(40, value_dim=5)
    state = op.init_state(2, 2, 8, 5, q)
    assert sum(x[0, 0].numel() for x in state) == (2 * 24 + 1) * (5 + 1) + 1
    state, _ = op.step(state, q, k, v)
    torch.testing.assert_close(state.moment[..., -1], op.features(k).sum(2), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state.energy, torch.full_like(state.energy, 40))


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
        ({"sigma": 0.0}, "`sigma` must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        operator(**options)
    with pytest.raises(ValueError, match="`num_heads`"):
        operator(num_heads=3)(*gaussian(4))
