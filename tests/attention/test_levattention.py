"""LevAttention: the universal set against chosen queries, its size, its causal form, the tail, what softmax lacks."""

import itertools
import math

import pytest
import torch

from attnlens.analysis.budget import operator_flops
from attnlens.attention.levattention import ROWS, LevAttention
from attnlens.attention.polynomial import Polynomial
from attnlens.attention.softmax import softmax_weights
from attnlens.linalg.polynomial_kernel import kernel_values, scaled
from attnlens.testing.inputs import gaussian

DEGREES = [2, 3, 4, 5.5]


def operator(num_keys=10, degree=4, max_length=4096, num_heads=2, **options):
    return LevAttention(num_keys, degree, max_length, num_heads, 0, **options)


def spread(length, head_dim=4, seed=0):
    """Keys of very different lengths."""
    q, k, v = gaussian(length, head_dim=head_dim, seed=seed)
    return q, k * torch.randn(k.shape[:3], generator=torch.Generator().manual_seed(9)).double().exp()[..., None], v


def hostile_queries(k, length):
    """For every key, the query whose least-squares share of it is largest; and the key itself. All of norm `length`."""
    gram = k.mT @ k + 1e-9 * torch.eye(k.shape[-1], dtype=k.dtype)
    y = torch.cat([torch.linalg.solve(gram, k.mT).mT, k], 2)
    return length * torch.nn.functional.normalize(y, dim=-1)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("degree", DEGREES)
def test_every_weight_above_eps_lies_in_the_universal_set(degree, normalize):
    """For certain, for any query within `query_norm`, short ones included."""
    q, k, _ = spread(200)
    op = operator(degree=degree, normalize=normalize, query_norm=50.0)
    inside, eps = op.universal_set(k)
    hostile = hostile_queries(scaled(k, normalize), 50.0)
    for queries in (q, hostile, 0.1 * hostile, hostile * 0.01):
        outside = Polynomial(degree, 0, normalize).matrix(queries, k).masked_fill(inside, 0)
        assert (outside.amax(-1) <= eps * (1 + 1e-9)).all()
    if degree == 2 and not normalize:
        reached = Polynomial(2).matrix(hostile, k).masked_fill(inside, 0).amax((-2, -1))
        assert (reached[..., None] > 0.9 * eps).all(), "at degree 2 the bound is the supremum"


@pytest.mark.parametrize("degree", DEGREES)
def test_causal_sets_hold_in_every_row(degree):
    q, k, _ = spread(ROWS + 40)
    op = operator(degree=degree, query_norm=50.0)
    inside, eps = op.universal_set(k, causal=True)
    assert (inside.sum(-1) <= 10).all()
    for t in (0, 5, 30, ROWS, ROWS + 39):
        hostile = hostile_queries(k[:, :, : t + 1], 50.0)
        weights = Polynomial(degree).matrix(hostile, k[:, :, : t + 1])
        outside = weights.masked_fill(inside[:, :, t, None, : t + 1], 0)
        assert (outside.amax((-2, -1)) <= eps[:, :, t] * (1 + 1e-9)).all()
    weights = Polynomial(degree).matrix(q, k, causal=True).masked_fill(inside, 0)
    assert (weights.amax(-1) <= eps * (1 + 1e-9)).all()


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_eps_depends_on_the_budget_and_not_on_the_length(degree):
    """The bounds sum to d (d + 1)^{p/2-1} at most, so that the (m + 1)-th largest is at most that over m + 1."""
    for length in (100, 3000):
        _, k, _ = gaussian(length, head_dim=4)
        for num_keys in (8, 64):
            _, eps = operator(num_keys, degree, iterations=40).universal_set(k)
            assert (eps <= 4 * 5 ** (degree / 2 - 1) / (num_keys + 1)).all()


def test_softmax_has_no_universal_set():
    """A key left out for its small score gets all the weight of a suitable query: no eps below 1 holds."""
    _, k, _ = gaussian(200, head_dim=4)
    inside, eps = operator(degree=2).universal_set(k)
    assert (eps < 0.5).all()
    # A vertex of the convex hull of the keys that is not in the set, by a linear program's easy case: the longest key.
    length = k.norm(dim=-1).masked_fill(inside[:, :, 0], 0)
    left_out = length.argmax(-1)
    query = 200 * k.gather(2, left_out[..., None, None].expand(-1, -1, 1, 4))
    weights = softmax_weights(query, k).squeeze(2)
    assert (weights.masked_fill(inside[:, :, 0], 0).sum(-1) > 0.99).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("degree", [2, 4])
def test_equals_the_dense_form_of_its_set_forward_and_backward(degree, causal):
    length = 2 * ROWS + 20
    tensors = [x.requires_grad_() for x in spread(length)]
    mask = torch.arange(length) < torch.tensor([length, length // 3])[:, None]
    op = operator(degree=degree, normalize=True)
    for padding in (None, mask):
        masks = {"causal": causal, "key_padding_mask": padding}
        q, k, v = tensors
        power = kernel_values(scaled(q, True), scaled(k, True), degree, **masks)
        clean = k.detach() if padding is None else torch.where(padding[:, None, :, None], k.detach(), 0)
        power = power * op.universal_set(clean, **masks)[0]
        expected = power @ v / (1 + power.sum(-1, keepdim=True))
        found = op(*tensors, **masks)
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)
        cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        pulled = [torch.autograd.grad((out * cotangent).sum(), tensors) for out in (found, expected)]
        for a, b in zip(*pulled, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("causal", [False, True])
def test_planted_heavy_keys_are_found_and_the_error_vanishes(causal):
    """Eight long keys in orthogonal directions among short ones: the set finds them, and they are all that matters.

    Causal, the first keys to span the space have scores of one, whatever their length: the set needs room for them.
    """
    q, k, v = gaussian(300)
    k = 0.03 * k
    position = torch.arange(8) * 7 + 3
    k[:, :, position] = 30 * torch.eye(8, dtype=torch.float64)
    op = operator(num_keys=24 if causal else 8)
    inside, _ = op.universal_set(k)
    assert inside[:, :, 0, position].all()
    exact = op.reference(q, k, v, causal=causal)
    assert (op(q, k, v, causal=causal) - exact)[:, :, 60:].norm() < 1e-4 * exact[:, :, 60:].norm()


def test_sampling_the_tail_makes_the_denominator_unbiased():
    q, k, _ = gaussian(60, batch=1)
    exact = 1 + kernel_values(scaled(q, False), scaled(k, False), 2).sum(-1)
    kept = kernel_values(scaled(q, False), scaled(k, False), 2)

    def denominators(op):
        # A weight is the kernel value over the denominator.
        column = op.universal_set(k)[0].double().argmax(-1, keepdim=True).expand(-1, -1, 60, -1)
        return (kept.gather(-1, column) / op.matrix(q, k).gather(-1, column)).squeeze(-1)

    samples = []
    for seed in range(300):
        op = LevAttention(10, 2, 64, 2, seed, num_samples=12)
        samples.append(denominators(op))
    draws = torch.stack(samples)
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 300**0.5 + 1e-9).all()
    without = denominators(operator(degree=2))
    assert (without < exact).all()
    assert (draws - exact).abs().mean() < 0.5 * (without - exact).abs().mean()
    everything = denominators(LevAttention(10, 2, 64, 2, 0, num_samples=60))
    torch.testing.assert_close(everything, exact, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("degree", [2, 4])
def test_cost_is_linear_in_the_length(degree, causal):
    op = operator(64, degree)
    costs = [
        operator_flops(op, *gaussian(n, batch=1, head_dim=64, dtype=torch.float32), causal=causal) for n in (1024, 2048)
    ]
    slopes = [math.log2(b / a) for a, b in itertools.pairwise(costs)]
    assert all(abs(slope - 1) < 0.03 for slope in slopes), slopes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_keys": 0}, "`num_keys` must be at least 1, got 0"),
        ({"degree": 1.5}, "`degree` must be at least 2, got 1.5"),
        ({"iterations": 0}, "`iterations` must be at least 1, got 0"),
        ({"num_samples": -1}, "`num_samples` must be at least 0, got -1"),
        ({"query_norm": 0.0}, "`query_norm` must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        operator(**options)


def test_the_sample_is_bidirectional_and_bounded_in_length():
    with pytest.raises(ValueError, match="`num_samples`=3"):
        operator(num_samples=3)(*gaussian(20), causal=True)
    with pytest.raises(ValueError, match="`max_length`=16"):
        operator(num_samples=3, max_length=16)(*gaussian(20))
