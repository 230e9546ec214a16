"""YOSO: counts of equal codes pair by pair as oracle, the moments of the estimate, the expectation as its target."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build, yoso
from attnlens.attention.yoso import angular_kernel
from attnlens.testing.inputs import EXACT, gaussian

CAUSAL = pytest.mark.parametrize("causal", [False, True])


def operator(seed=0, **overrides):
    config = OmegaConf.load("conf/attention/yoso.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=128, seed=seed, **overrides).double()


def pair_counts(q, k, planes, num_bits, causal):
    """B of one head, pair by pair and bit by bit."""
    hashes = planes.shape[1] // num_bits
    weights = torch.zeros(len(q), len(k), dtype=q.dtype)
    for i in range(len(q)):
        for j in range(i + 1 if causal else len(k)):
            equal = ((q[i] @ planes > 0) == (k[j] @ planes > 0)).view(hashes, num_bits)
            weights[i, j] = equal.all(-1).double().mean()
    return weights


def loop_attention(q, k, v, op, causal):
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            y = pair_counts(q[b, h], k[b, h], op.planes[h], op.num_bits, causal) @ v[b, h]
            length = y.norm(dim=-1, keepdim=True)
            out[b, h] = torch.where(length > 0, y / length.clamp_min(1e-300), 0)
    return out


@CAUSAL
@pytest.mark.parametrize(("length", "hashes", "bits"), [(1, 3, 2), (7, 1, 1), (12, 5, 3), (20, 2, 6)])
def test_equals_the_counts_forward_and_backward(length, hashes, bits, causal):
    """Hashes are constants: values alone receive a gradient."""
    op = operator(num_hashes=hashes, num_bits=bits)
    q, k, v = gaussian(length, value_dim=5)
    v.requires_grad_()
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(q, k, v, causal=causal), loop_attention(q, k, v, op, causal)
    assert torch.allclose(found, expected, atol=EXACT)
    gradients = (torch.autograd.grad(x, v, direction)[0] for x in (found, expected))
    assert torch.allclose(*gradients, atol=EXACT)


@CAUSAL
def test_hashes_in_small_portions_and_rows_in_blocks_change_nothing(monkeypatch, causal):
    q, k, v = gaussian(30)
    ops = operator(num_hashes=7), operator(expectation=True)
    whole = [op(q, k, v, causal=causal) for op in ops]
    monkeypatch.setattr(yoso, "IN_FLIGHT", 5000)
    monkeypatch.setattr(yoso, "ROWS", 7)
    for op, out in zip(ops, whole, strict=True):
        assert torch.allclose(op(q, k, v, causal=causal), out, atol=EXACT)


def test_mean_and_variance_are_those_of_bernoulli_variables():
    """E B = (1 - angle/pi)^t and Var B = E B (1 - E B) / m, over 3000 independent operators in one (its heads)."""
    draws, hashes, bits = 3000, 4, 3
    op = yoso.Yoso(hashes, bits, head_dim=8, num_heads=draws, seed=0).double()
    q, k, _ = (x[:1, :1].expand(-1, draws, -1, -1) for x in gaussian(6))
    estimate, p = op.kernel(q, k)[0], op.kernel_target(q, k)[0, 0]
    assert ((estimate.mean(0) - p).abs() <= 5 * (p * (1 - p) / hashes / draws).sqrt()).all()
    # The relative error of a variance over n draws is sqrt((kurtosis - 1) / n), and kurtosis <= 3 + 1/(m p (1 - p)).
    allowed = 5 * ((2 + 1 / (hashes * p * (1 - p))) / draws).sqrt()
    assert ((estimate.var(0) * hashes / (p * (1 - p)) - 1).abs() <= allowed).all()


@CAUSAL
def test_expectation_is_the_dense_kernel_with_its_gradient(causal):
    inputs = [x.requires_grad_() for x in gaussian(13, value_dim=5)]
    q, k, v = inputs
    cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    weights = (1 - torch.acos(cosine) / math.pi) ** 4
    y = (weights.tril() if causal else weights) @ v
    expected, found = y / y.norm(dim=-1, keepdim=True), operator(expectation=True)(q, k, v, causal=causal)
    assert torch.allclose(found, expected, atol=EXACT)
    direction = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


def test_equal_queries_and_keys_have_finite_gradients():
    """The slope of arccos is infinite at angle zero."""
    x = gaussian(9)[0].requires_grad_()
    operator(expectation=True)(x, x, x).sum().backward()
    assert x.grad.isfinite().all()


def test_hard_codes_give_queries_no_gradient_unless_straight_through():
    inputs = [x.requires_grad_() for x in gaussian(9)]
    direction = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    hard = torch.autograd.grad(operator()(*inputs), inputs, direction, allow_unused=True)
    assert hard[0] is None
    assert hard[1] is None
    passed = operator(straight_through=True)
    out = passed(*inputs)
    assert torch.allclose(out, operator()(*inputs), atol=EXACT)
    # With so many hashes that the two agree, the gradients do too.
    many = operator(straight_through=True, num_hashes=40000)
    found = torch.autograd.grad(many(*inputs), inputs, direction)
    expected = torch.autograd.grad(operator(expectation=True)(*inputs), inputs, direction)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() < 0.1 * y.norm()


def test_lengths_of_queries_and_keys_do_not_matter():
    q, k, v = gaussian(20)
    for op in (operator(), operator(expectation=True)):
        assert torch.allclose(op(100 * q, 0.01 * k, v), op(q, k, v), atol=EXACT)


def test_outputs_have_unit_length_or_are_zero():
    """A causal first row whose own key has another code sees nothing."""
    q, _, v = gaussian(30)
    length = operator(num_hashes=2, num_bits=8)(q, -q, v, causal=True).norm(dim=-1)
    assert ((length - 1).abs().lt(EXACT) | (length == 0)).all()
    assert (length == 0).any()


@CAUSAL
def test_running_sums_keep_float32_precision(causal):
    """A bucket's sum is a difference of running sums over all keys: its error stays near that of the dense product."""
    q, k, v = gaussian(2000, batch=1)
    op = operator(num_bits=8)
    exact = op(q, k, v, causal=causal)
    single = op.float()(*(x.float() for x in (q, k, v)), causal=causal)
    off = (single - exact).norm(dim=-1)
    # Codes of vectors within round-off of a plane may differ; hence a quantile.
    assert off.quantile(0.99) < 1e-4


@CAUSAL
def test_the_bound_is_a_few_times_the_error(causal):
    """Chebyshev's factor sqrt(10) and the spread of the draws are all that stands between the two."""
    q, k, v = gaussian(40)
    op = operator(num_hashes=1024)
    bound = op.error_bound(q, k, v, causal=causal)
    error = (op(q, k, v, causal=causal) - op.reference(q, k, v, causal=causal)).norm(dim=-1)
    assert bound.median() < 6 * error.median()
    assert operator(expectation=True).error_bound(q, k, v, causal=causal).max() < 1e-4


def test_second_moment_is_that_of_the_codes():
    """Three vectors on one side of a plane: 1 - (sum of their angles) / (2 pi), to the power of the bits."""
    draws = 20000
    op = yoso.Yoso(1, 2, head_dim=8, num_heads=draws, seed=0).double()
    q, k, v = gaussian(4, batch=1)
    sums = op._sums(*(x[:, :1].expand(-1, draws, -1, -1) for x in (q, k, v)), causal=False)[0]
    found = sums.square().sum(-1)
    share, among = angular_kernel(q, k, 1), angular_kernel(k, k, 1)
    expected = yoso.expected_square(share, among, v, 2, causal=False)[0, 0]
    assert ((found.mean(0) - expected).abs() <= 5 * found.std(0) / draws**0.5).all()


def test_angular_kernel_is_one_minus_the_share_of_the_angle():
    angle = torch.linspace(0, math.pi, 9, dtype=torch.float64)
    k = torch.stack([angle.cos(), angle.sin()], -1)[None, None]
    found = angular_kernel(k[:, :, :1], k, 3)[0, 0, 0]
    assert torch.allclose(found, (1 - angle / math.pi) ** 3, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hashes": 0}, "`num_hashes` must be at least 1, got 0"),
        ({"num_bits": 17}, "`num_bits` must be 1 to 16, got 17"),
        ({"expectation": True, "straight_through": True}, "`straight_through` has no effect"),
    ],
)
def test_bad_arguments_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        operator(**overrides)
