"""KDEformer: a dense matrix built token by token as oracle, the variance of its row sums, no leak, no overflow."""

import itertools
import math

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import count_flops
from attnlens.attention import build
from attnlens.attention.kdeformer import KDEformer
from attnlens.attention.softmax import softmax_naive
from attnlens.linalg.hashing import hyperplane_code
from attnlens.testing.inputs import EXACT, gaussian

CAUSAL = pytest.mark.parametrize("causal", [False, True])


def operator(block_size=3, head_dim=8, max_length=128, seed=0, **overrides):
    config = OmegaConf.load("conf/attention/kdeformer.yaml")
    sizes = {"head_dim": head_dim, "num_heads": 2, "max_length": max_length, "seed": seed}
    return build(config, **sizes, block_size=block_size, **overrides).double()


def raced(keys, v, waiting, size):
    """Members of the sample from `keys` and what each stands for, by its definition."""
    lengths = [v[j].norm().item() for j in keys]
    p = {j: (length / sum(lengths) + 1 / len(keys)) / 2 for j, length in zip(keys, lengths, strict=True)}
    arrival = {j: waiting[j].item() / p[j] for j in keys}
    order = sorted(keys, key=lambda j: arrival[j])
    if size >= len(keys):
        return dict.fromkeys(keys, 1.0)
    last = arrival[order[size]]
    return {j: 1 / (1 - math.exp(-p[j] * last)) for j in order[:size]}


def place(out, i, sample, block):
    for j, weight in sample.items():
        out[i, j] = weight
    out[i, block] = 1


def equal_weights(codes, v, waiting, b, m):
    """The matrix of weights 0, 1 and w_j of one head, bidirectional."""
    n = len(v)
    groups = -(-n // b)
    bounds = [g * n // groups for g in range(groups + 1)]
    by_q, by_k = (sorted(range(n), key=lambda j, c=c: c[j].item()) for c in codes)
    out, sample = torch.zeros(n, n, dtype=v.dtype), raced(range(n), v, waiting, m)
    for start, stop in itertools.pairwise(bounds):
        for i in by_q[start:stop]:
            place(out, i, sample, by_k[start:stop])
    return out


def own_block(keys, code, codes, b):
    """The block of sorted `keys` in whose interval `code` falls."""
    ordered = sorted(keys, key=lambda j: codes[j].item())
    rank = (sum(codes[j] < code for j in ordered) + sum(codes[j] <= code for j in ordered)) // 2
    block = min(int(rank), len(ordered) - 1) // b
    return ordered[block * b : (block + 1) * b]


def own_weights(codes, v, waiting, b, m):
    out, sample = torch.zeros(len(codes[0]), len(v), dtype=v.dtype), raced(range(len(v)), v, waiting, m)
    for i in range(len(out)):
        place(out, i, sample, own_block(range(len(v)), codes[0][i], codes[1], b))
    return out


def dyadic_weights(codes, v, waiting, b, m):
    """The same, causal: leaf by leaf and cell by cell from the position of each row alone."""
    n = len(v)
    out = torch.zeros(n, n, dtype=v.dtype)
    for i in range(n):
        size = 4 * b
        out[i, i - i % size : i + 1] = 1
        while size < n:
            if (i // size) % 2 == 1:
                cell = range((i // size - 1) * size, i // size * size)
                place(out, i, raced(cell, v, waiting, m), own_block(cell, codes[0][i], codes[1], b))
            size *= 2
    return out


def naive(q, k, v, op, rule):
    """The definition of the output from the dense matrix of weights, which are constants."""
    codes = hyperplane_code(q, op.planes), hyperplane_code(k, op.planes)
    out = []
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        of_head = codes[0][b, h], codes[1][b, h]
        weights = rule(of_head, v[b, h].detach(), op.waiting[h], op.block_size, op.num_samples)
        kernel = weights * torch.exp(q[b, h] @ k[b, h].T / q.shape[-1] ** 0.5)
        out.append(kernel @ v[b, h] / kernel.sum(-1, keepdim=True))
    return torch.stack(out).view(*q.shape[:3], v.shape[-1])


@pytest.mark.parametrize("form", ["equal", "own", "causal"])
@pytest.mark.parametrize(("length", "block", "samples"), [(1, 2, 1), (5, 1, 3), (13, 3, 2), (37, 2, 4), (25, 3, 40)])
def test_equals_the_dense_matrix_of_weights_forward_and_backward(length, block, samples, form):
    rule = {"equal": equal_weights, "own": own_weights, "causal": dyadic_weights}[form]
    op = operator(block, num_samples=samples, sort_queries=form != "own")
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(*inputs, causal=form == "causal"), naive(*inputs, op, rule)
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


def test_more_queries_than_keys_where_queries_are_not_sorted():
    op = operator(3, sort_queries=False)
    q, k, v = gaussian(40)
    k, v = k[:, :, :17], v[:, :, :17]
    assert torch.allclose(op(q, k, v), naive(q, k, v, op, own_weights), atol=EXACT)
    part = op(q[:, :, 5:9], k, v)
    assert torch.allclose(part, op(q, k, v)[:, :, 5:9], atol=EXACT)
    with pytest.raises(ValueError, match="as many queries as keys"):
        operator(3)(q, k, v)


@CAUSAL
def test_row_sums_are_unbiased_given_the_blocks_with_the_variance_of_uncorrelated_weights(causal):
    """2000 heads of equal planes; Var of a row sum = sum over sampled keys of Var(w_j) A_ij^2."""
    draws, n = 2000, 24
    q, k, _ = gaussian(n, batch=1)
    op = KDEformer(2, 4, head_dim=8, num_heads=draws, max_length=n, seed=0, num_samples=3).double()
    op.planes = op.planes[:1].expand(draws, -1, -1)
    q, k = (x[:, :1].expand(-1, draws, -1, -1) for x in (q, k))
    estimate, truth = op.kernel(q, k, causal=causal)[0], op.kernel_target(q, k)[0, 0]
    truth = truth.tril() if causal else truth
    for found, expected in ((estimate, truth), (estimate.sum(-1), truth.sum(-1))):
        error = (found.mean(0) - expected).abs()
        assert (error <= 5 * found.std(0) / draws**0.5 + EXACT).all()
    spread = estimate.sum(-1).var(0)
    apart = estimate.var(0).sum(-1)
    assert spread.max() > 0.1
    assert ((spread - apart).abs() <= 0.35 * apart + EXACT).all()


def test_values_of_unequal_length_are_better_sampled_by_their_length():
    """A tenth of the keys carry nearly all values: half the squared error of `hyperattention`, or less."""
    n, seeds = 96, 30
    q, k, v = gaussian(n, logit_scale=0.3)
    loud = torch.rand(2, 2, n, generator=torch.Generator().manual_seed(4)) < 0.1
    v = torch.where(loud[..., None], 30.0, 0.1) * v
    exact = softmax_naive(q, k, v)
    other = OmegaConf.load("conf/attention/hyperattention.yaml")
    squares = [0.0, 0.0]
    for seed in range(seeds):
        sizes = {"head_dim": 8, "num_heads": 2, "max_length": 128, "seed": seed, "block_size": 12}
        for i, op in enumerate((operator(12, seed=seed), build(other, **sizes).double())):
            squares[i] += (op(q, k, v) - exact).square().sum().item()
    assert squares[0] < 0.5 * squares[1]


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_causal_output_of_a_prefix_is_that_of_the_whole(block_size):
    op = operator(block_size)
    q, k, v = gaussian(97)
    whole = op(q, k, v, causal=True)
    for length in (1, 17, 33, 48, 49, 64, 96):
        prefix = op(*(x[:, :, :length] for x in (q, k, v)), causal=True)
        assert torch.allclose(prefix, whole[:, :, :length], atol=EXACT)


@pytest.mark.parametrize("form", ["equal", "own", "causal"])
def test_padding_anywhere_is_skipped(form):
    """The loudest values stand in the padding: they take no part in the probabilities."""
    op = operator(2, sort_queries=form != "own")
    q, k, v = gaussian(45)
    mask = torch.rand(2, 45, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[1, :20] = False
    real = mask[:, None, :, None]
    outs = [
        op(*(torch.where(real, x, fill) for x in (q, k, v)), causal=form == "causal", key_padding_mask=mask)
        for fill in (torch.nan, 1e6)
    ]
    assert torch.equal(outs[0].masked_fill(~real, 0), outs[1].masked_fill(~real, 0))


@CAUSAL
def test_no_overflow_in_float32_at_logits_of_hundreds(causal):
    """The authors' exponentials without a maximum are infinite from 89 on."""
    q, k, v = (x.float().requires_grad_() for x in gaussian(70, logit_scale=100.0))
    op = operator(4).float()
    out = op(q, k, v, causal=causal)
    out.sum().backward()
    assert (q @ k.mT * 8**-0.5).max() > 200
    assert all(torch.isfinite(x).all() for x in (out, q.grad, k.grad, v.grad))


def test_error_falls_with_the_budget():
    q, k, v = gaussian(128, logit_scale=0.1)
    for causal in (False, True):
        exact = softmax_naive(q, k, v, causal=causal)
        errors = [
            sum((operator(b, seed=s)(q, k, v, causal=causal) - exact).square().sum().item() for s in range(10))
            for b in (2, 8, 32, 128)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < EXACT


@CAUSAL
def test_cost_is_nearly_linear_in_the_length(causal):
    lengths = (1024, 2048, 4096)
    flops = []
    for n in lengths:
        q, k, v = (x.float() for x in gaussian(n, batch=1, head_dim=32))
        op = operator(32, head_dim=32, max_length=n).float()
        flops.append(count_flops(lambda *x, op=op: op(*x, causal=causal), q, k, v))
    slope = math.log(flops[-1] / flops[0]) / math.log(4)
    assert slope < (1.3 if causal else 1.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"num_planes": 31}, "`num_planes` must be 1 to 30"),
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(overrides, message):
    arguments = {"block_size": 4, "num_planes": 7, "head_dim": 8, "num_heads": 2, "max_length": 16, "seed": 0}
    with pytest.raises(ValueError, match=message):
        KDEformer(**{**arguments, **overrides})


def test_input_beyond_max_length_names_the_remedy():
    with pytest.raises(ValueError, match="beyond `max_length`=16: build with a larger one"):
        operator(max_length=16)(*gaussian(17))
