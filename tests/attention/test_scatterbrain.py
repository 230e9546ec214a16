"""Scatterbrain: the paper's signed form as oracle, unbiased with the predicted variance, and never a lost row."""

import itertools
import math

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import count_flops
from attnlens.attention import build
from attnlens.attention.scatterbrain import Scatterbrain, all_but_one, signed_normalizer
from attnlens.attention.softmax import softmax_naive
from attnlens.linalg.hashing import hyperplane_code
from attnlens.linalg.partial import partial_attention
from attnlens.linalg.random_features import positive_log_features
from attnlens.testing.inputs import EXACT, gaussian

CAUSAL = pytest.mark.parametrize("causal", [False, True])


def operator(head_dim=8, seed=0, **overrides):
    config = OmegaConf.load("conf/attention/scatterbrain.yaml")
    sizes = {"head_dim": head_dim, "num_heads": 2, "max_length": 128, "seed": seed}
    return build(config, **sizes, **{"block_size": 3, **overrides}).double()


def block_of(keys, code, codes, b):
    ordered = sorted(keys, key=lambda j: codes[j].item())
    rank = (sum(codes[j] < code for j in ordered) + sum(codes[j] <= code for j in ordered)) // 2
    block = min(int(rank), len(ordered) - 1) // b
    return ordered[block * b : (block + 1) * b]


def exact_pairs(op, q, k, causal, mask):
    """The support of every head, token by token."""
    n, m = q.shape[2], k.shape[2]
    out = torch.zeros(*q.shape[:3], m, dtype=torch.bool)
    codes = hyperplane_code(q, op.planes), hyperplane_code(k, op.planes)
    for b, h, i in itertools.product(range(q.shape[0]), range(q.shape[1]), range(n)):
        real = range(m) if mask is None else [j for j in range(m) if mask[b, j]]
        of_q, of_k, size = codes[0][b, h, i], codes[1][b, h], 4 * op.block_size
        if not causal:
            out[b, h, i, block_of(real, of_q, of_k, op.block_size)] = True
            continue
        out[b, h, i, [j for j in real if i - i % size <= j <= i]] = True
        while size < n:
            cell = [j for j in real if (i // size - 1) * size <= j < i // size * size]
            if (i // size) % 2 == 1 and cell:
                out[b, h, i, block_of(cell, of_q, of_k, op.block_size)] = True
            size *= 2
    return out


def signed(op, q, k, v, causal, mask=None):
    """(phi(X) phi(Y)^T + S) V over its row sums, as the paper writes it."""
    with torch.no_grad():
        support = exact_pairs(op, q, k if mask is None else torch.where(mask[:, None, :, None], k, 0), causal, mask)
    root = q.shape[-1] ** -0.25
    w = op.projections.expand(q.shape[0], -1, -1, -1)
    phi = [positive_log_features(root * x, w).exp() for x in (q, k)]
    low_rank = phi[0] @ phi[1].mT
    kernel = low_rank + torch.where(support, (q @ k.mT * root**2).exp() - low_rank, 0)
    kernel = kernel.tril() if causal else kernel
    kernel = kernel if mask is None else torch.where(mask[:, None, None], kernel, 0)
    return kernel @ v / kernel.sum(-1, keepdim=True)


@CAUSAL
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "block"), [(1, 2), (5, 1), (13, 3), (30, 2), (37, 2)])
def test_equals_the_signed_form_forward_and_backward(length, block, masked, causal):
    op = operator(block_size=block)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    mask = None
    if masked:
        mask = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[:, 0] = True
    found, expected = op(*inputs, causal=causal, key_padding_mask=mask), signed(op, *inputs, causal, mask)
    assert torch.allclose(found, expected, atol=EXACT)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@CAUSAL
def test_the_reported_support_is_that_of_the_loop(causal):
    op = operator(block_size=2)
    q, k, _ = gaussian(37, logit_scale=30.0)
    assert torch.equal(op.support(q, k, causal=causal), exact_pairs(op, q, k, causal, None))


def test_more_queries_than_keys():
    op = operator(block_size=3)
    q, k, v = gaussian(30)
    k, v = k[:, :, :11], v[:, :, :11]
    assert torch.allclose(op(q, k, v), signed(op, q, k, v, False), atol=EXACT)


@pytest.mark.parametrize("groups", [2, 3, 4, 7, 8])
def test_all_but_one_merges_exactly_the_others(groups):
    """As attention over the keys of all other groups; no subtraction, so a group e^700 above the others is no harm."""
    q, k, v = (x[:1, :1] for x in gaussian(4 * groups))
    k = k.clone()
    k[:, :, :4] = 900 * q[:, :, :1] / q[:, :, :1].square().sum()
    rows = q[:, :, :5]
    parts = [partial_attention(rows, k[:, :, i : i + 4], v[:, :, i : i + 4]) for i in range(0, 4 * groups, 4)]
    out, lse = all_but_one(torch.stack([p[0] for p in parts], 2), torch.stack([p[1] for p in parts], 2))
    for g in range(groups):
        rest = [j for j in range(4 * groups) if j // 4 != g]
        expected = partial_attention(rows, k[:, :, rest], v[:, :, rest])
        assert torch.allclose(out[:, :, g], expected[0], atol=EXACT)
        assert torch.allclose(lse[:, :, g], expected[1], atol=EXACT)


@CAUSAL
def test_the_kernel_is_unbiased_and_exact_on_the_support(causal):
    """1000 heads of equal planes, so of one support: outside it the mean over features, on it every draw."""
    heads, n = 1000, 20
    q, k, _ = (x[:1, :1].expand(1, heads, -1, -1) for x in gaussian(n, logit_scale=0.5))
    op = Scatterbrain(8, 2, 4, head_dim=8, num_heads=heads, seed=0).double()
    op.planes = op.planes[:1].expand(heads, -1, -1)
    estimate, truth = op.kernel(q, k, causal=causal)[0], op.kernel_target(q, k)[0, 0]
    truth = truth.tril() if causal else truth
    error = (estimate.mean(0) - truth).abs()
    assert (error <= 5 * estimate.std(0) / heads**0.5 + EXACT).all()
    support = op.support(q, k, causal=causal)[0, 0]
    assert (estimate - truth).abs()[:, support].max() < EXACT
    outside = ~support & (torch.ones_like(support).tril() if causal else True)
    assert estimate.std(0)[outside].min() > 1e-4


def test_variance_is_that_of_the_features_times_the_probability_to_be_outside():
    """Monte Carlo over supports and features at once, entry by entry and summed."""
    heads, n, m = 4000, 12, 8
    q, k, _ = (x[:1, :1].expand(1, heads, -1, -1) for x in gaussian(n, logit_scale=0.1))
    op = Scatterbrain(m, 3, 4, head_dim=8, num_heads=heads, seed=1, orthogonal=False).double()
    estimate, truth = op.kernel(q, k)[0], op.kernel_target(q, k)[0, 0]
    outside = (~op.support(q, k)[0]).double().mean(0)
    both = (q[0, 0][:, None] + k[0, 0][None]) * 8**-0.25
    of_features = truth.square() * (both.square().sum(-1).exp() - 1) / m
    found, square = (estimate - truth).square().mean(0), (estimate - truth).square()
    predicted = outside * of_features
    assert outside.min() > 0.2
    assert outside.max() < 0.95
    assert ((found - predicted).abs() <= 6 * square.std(0) / heads**0.5).double().mean() > 0.97
    assert abs(found.sum() / predicted.sum() - 1) < 0.1


def test_keys_like_the_query_are_on_the_support_more_often_than_chance():
    k = gaussian(64)[1]
    op = operator(block_size=8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    found = op.support(k[:, :, order], k)[..., torch.arange(64), order].double().mean().item()
    assert found > 0.6


def test_row_sums_that_the_signed_form_loses_are_counted_and_kept():
    """At x = y = w/2, half of a feature, that feature takes e^{<x, y>} for e^{|w|^2/2} times as much, 10^13 at d = 64.
    On the support, where such a pair belongs, nothing of the row is left after the subtraction in float32: the signed
    form has row sums that are not positive. The form that is computed loses none, and agrees with float64."""
    op = Scatterbrain(4, 8, 16, head_dim=64, num_heads=2, seed=0)
    q, k, v = (x.float() for x in gaussian(64, head_dim=64, logit_scale=0.3))
    half = op.projections[:, :1] / 2 * 64**0.25
    q, k = q.clone(), k.clone()
    q[:, :, 10:20], k[:, :, 30:31] = half, half
    assert op.nonpositive_rows(q, k).sum() > 0
    out, ones = op(q, k, v), op(q, k, torch.ones_like(v))
    assert torch.allclose(ones, torch.ones_like(ones), atol=1e-5)
    assert (op.double()(q.double(), k.double(), v.double()) - out).abs().max() < 1e-3


@CAUSAL
def test_no_overflow_in_float32_at_logits_of_hundreds(causal):
    q, k, v = (x.float().requires_grad_() for x in gaussian(70, logit_scale=100.0))
    op = operator(block_size=2).float()
    out = op(q, k, v, causal=causal)
    out.sum().backward()
    assert (q @ k.mT * 8**-0.5).max() > 200
    assert all(torch.isfinite(x).all() for x in (out, q.grad, k.grad, v.grad))
    sums = op.matrix(q.detach(), k.detach(), causal=causal).sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_causal_output_of_a_prefix_is_that_of_the_whole(block_size):
    op = operator(block_size=block_size)
    q, k, v = gaussian(97)
    whole = op(q, k, v, causal=True)
    for length in (1, 17, 33, 48, 49, 64, 96):
        prefix = op(*(x[:, :, :length] for x in (q, k, v)), causal=True)
        assert torch.allclose(prefix, whole[:, :, :length], atol=EXACT)


@CAUSAL
def test_a_larger_block_lowers_the_error_of_features_alone(causal):
    q, k, v = gaussian(96, logit_scale=0.3)
    exact = softmax_naive(q, k, v, causal=causal)
    errors = [
        sum((operator(seed=s, block_size=b)(q, k, v, causal=causal) - exact).square().sum().item() for s in range(8))
        for b in (1, 6, 24, 96)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < EXACT


@CAUSAL
def test_cost_is_nearly_linear_in_the_length(causal):
    flops = []
    for n in (1024, 2048, 4096):
        q, k, v = (x.float() for x in gaussian(n, batch=1, head_dim=32))
        op = operator(head_dim=32, block_size=32, num_features=32).float()
        flops.append(count_flops(lambda *x, op=op: op(*x, causal=causal), q, k, v))
    slope = math.log(flops[-1] / flops[0]) / math.log(4)
    assert slope < (1.35 if causal else 1.1)


def test_signed_normalizer_is_the_row_sum_of_the_kernel_up_to_its_stabilizer():
    op = operator(block_size=3)
    q, k, _ = gaussian(20)
    sums = signed_normalizer(q, k, op.projections, op.support(q, k))
    ratio = op.kernel(q, k).sum(-1) / sums
    root = 8**-0.25
    w = op.projections.expand(2, -1, -1, -1)
    log_phi = [positive_log_features(root * x, w) for x in (q, k)]
    top = torch.maximum(
        (log_phi[0][..., None, :] + log_phi[1][:, :, None]).amax((-2, -1)), (q @ k.mT * root**2).amax(-1)
    )
    assert torch.allclose(ratio.log(), top, atol=EXACT)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"num_features": 0}, "`num_features` must be at least 1, got 0"),
        ({"num_planes": 0}, "`num_planes` must be 1 to 30"),
    ],
)
def test_bad_arguments_are_refused(overrides, message):
    arguments = {"num_features": 4, "block_size": 4, "num_planes": 4, "head_dim": 8, "num_heads": 2, "seed": 0}
    with pytest.raises(ValueError, match=message):
        Scatterbrain(**{**arguments, **overrides})
