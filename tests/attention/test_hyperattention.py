"""HyperAttention: a dense matrix built token by token as oracle, unbiased row sums, no leak by length or sorting."""

import itertools

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.hyperattention import HyperAttention
from attnlens.attention.softmax import softmax_naive
from attnlens.testing.inputs import EXACT, gaussian

CAUSAL = pytest.mark.parametrize("causal", [False, True])


def operator(block_size=3, head_dim=8, max_length=128, seed=0):
    config = OmegaConf.load("conf/attention/hyperattention.yaml")
    sizes = {"head_dim": head_dim, "num_heads": 2, "max_length": max_length, "seed": seed}
    return build(config, **sizes, block_size=block_size).double()


def code(x, planes):
    """Gray position of the sign pattern, by counting through the Gray code."""
    gray = {tuple(int(bit) for bit in f"{i ^ (i >> 1):0{planes.shape[1]}b}"): i for i in range(2 ** planes.shape[1])}
    return gray[tuple(int(x @ planes[:, i] > 0) for i in range(planes.shape[1]))]


def sampled(keys, priority, size):
    """Members of the sample from `keys` and what each stands for."""
    members = sorted(keys, key=lambda j: priority[j])[:size]
    return members, len(keys) / len(members)


def blockwise_weights(q, k, planes, priority, b):
    """The matrix of weights 0, 1 and n/l, bidirectional, for one head."""
    n = len(q)
    groups = -(-n // b)
    bounds = [g * n // groups for g in range(groups + 1)]
    by_q = sorted(range(n), key=lambda i: code(q[i], planes))
    by_k = sorted(range(n), key=lambda j: code(k[j], planes))
    members, weight = sampled(range(n), priority, b)
    out = torch.zeros(n, n, dtype=q.dtype)
    for start, stop in itertools.pairwise(bounds):
        for i in by_q[start:stop]:
            out[i, members] = weight
            out[i, by_k[start:stop]] = 1
    return out


def dyadic_weights(q, k, planes, priority, b):
    """The same, causal: leaf by leaf and cell by cell from the position of each row alone."""
    n = len(q)
    out = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        size = 4 * b
        out[i, i - i % size : i + 1] = 1
        while size < n:
            if (i // size) % 2 == 1:
                start = (i // size - 1) * size
                ordered = sorted(range(start, start + size), key=lambda j: code(k[j], planes))
                codes, own = [code(k[j], planes) for j in ordered], code(q[i], planes)
                rank = (sum(c < own for c in codes) + sum(c <= own for c in codes)) // 2
                block = min(rank, size - 1) // b
                members, weight = sampled(ordered, priority, b)
                out[i, members] = weight
                out[i, ordered[block * b : (block + 1) * b]] = 1
            size *= 2
    return out


def naive(q, k, v, op, causal):
    """The definition of the output from the dense matrix of weights."""
    rule = dyadic_weights if causal else blockwise_weights
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            with torch.no_grad():
                weights = rule(q[b, h], k[b, h], op.planes[h], op.priority[h].tolist(), op.block_size)
            kernel = weights * torch.exp(q[b, h] @ k[b, h].T / q.shape[-1] ** 0.5)
            out.append(kernel @ v[b, h] / kernel.sum(-1, keepdim=True))
    return torch.stack(out).view(*q.shape[:3], v.shape[-1])


@CAUSAL
@pytest.mark.parametrize(
    ("length", "block_size"), [(1, 2), (5, 1), (13, 1), (13, 3), (16, 2), (37, 2), (25, 3), (9, 9)]
)
def test_equals_the_dense_matrix_of_weights_forward_and_backward(length, block_size, causal):
    op = operator(block_size)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(*inputs, causal=causal), naive(*inputs, op, causal)
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@CAUSAL
def test_kernel_and_row_sums_are_unbiased_given_the_blocks(causal):
    """2000 heads of equal planes differ in their sample only; without the weight n/l sums would be far too small."""
    draws, n = 2000, 24
    q, k, _ = gaussian(n, batch=1)
    op = HyperAttention(block_size=2, num_planes=4, head_dim=8, num_heads=draws, max_length=n, seed=0).double()
    op.planes = op.planes[:1].expand(draws, -1, -1)
    q, k = (x[:, :1].expand(-1, draws, -1, -1) for x in (q, k))
    estimate, truth = op.kernel(q, k, causal=causal)[0], op.kernel_target(q, k)[0, 0]
    truth = truth.tril() if causal else truth
    for found, expected in ((estimate, truth), (estimate.sum(-1), truth.sum(-1))):
        error = (found.mean(0) - expected).abs()
        assert (error <= 5 * found.std(0) / draws**0.5 + EXACT).all()
    assert estimate.sum(-1).std(0).max() > 0.1 * truth.sum(-1).mean()


@CAUSAL
@pytest.mark.parametrize("form_length", [(70, 3), (64, 2), (40, 16)])
def test_row_sums_are_those_of_the_kernel(form_length, causal):
    length, block_size = form_length
    q, k, v = gaussian(length)
    op = operator(block_size)
    _, lse = op.estimate(q, k, v, causal=causal, key_padding_mask=None)
    assert torch.allclose(lse.exp(), op.kernel(q, k, causal=causal).sum(-1), rtol=1e-10)


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_causal_output_of_a_prefix_is_that_of_the_whole(block_size):
    """Recursion in halves of the sequence would give other cells to every length."""
    op = operator(block_size)
    q, k, v = gaussian(97)
    whole = op(q, k, v, causal=True)
    for length in (1, 4, 17, 33, 48, 49, 64, 65, 96):
        prefix = op(*(x[:, :, :length] for x in (q, k, v)), causal=True)
        assert torch.allclose(prefix, whole[:, :, :length], atol=EXACT)


def test_causal_rows_do_not_depend_on_other_queries():
    """Sorting queries into equal blocks, as the paper's recursion does, moves a row when a later query changes."""
    op = operator(2)
    q, k, v = gaussian(64)
    other = gaussian(64, seed=5)[0]
    for i in (9, 31, 40, 63):
        mixed = other.clone()
        mixed[:, :, i] = q[:, :, i]
        assert torch.allclose(op(mixed, k, v, causal=True)[:, :, i], op(q, k, v, causal=True)[:, :, i], atol=EXACT)


@CAUSAL
def test_padding_inside_the_sequence_is_skipped(causal):
    """Whatever stands in padded places, holes in a cell included, real rows keep their values and rows sum to one."""
    op = operator(2)
    q, k, v = gaussian(45)
    mask = torch.rand(2, 45, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[1, :20] = False
    real = mask[:, None, :, None]
    outs = [
        op(*(torch.where(real, x, fill) for x in (q, k, v)), causal=causal, key_padding_mask=mask)
        for fill in (torch.nan, 3.0)
    ]
    assert torch.equal(outs[0].masked_fill(~real, 0), outs[1].masked_fill(~real, 0))
    ones = op(q, k, torch.ones_like(v), causal=causal, key_padding_mask=mask)
    assert torch.allclose(ones[real.expand_as(ones)], torch.ones((), dtype=torch.float64))
    if not causal:
        for row in range(2):
            assert torch.isfinite(outs[0][row]).all()


@CAUSAL
def test_a_block_as_large_as_the_padded_cells_is_exact_under_padding(causal):
    q, k, v = gaussian(45)
    mask = torch.arange(45) < torch.tensor([45, 16])[:, None]
    exact = softmax_naive(q, k, v, causal=causal, key_padding_mask=mask)
    short = operator(16)(q, k, v, causal=causal, key_padding_mask=mask)
    assert torch.allclose(short[1, :, :16], exact[1, :, :16], atol=EXACT)
    long = operator(45)(q, k, v, causal=causal, key_padding_mask=mask)
    assert torch.allclose(long[0], exact[0], atol=EXACT)


def test_blocks_find_matching_keys_more_often_than_chance():
    """q_i = k_i, so equal codes: the exact block holds the match of most rows, of 1/8 of them by chance."""
    k = gaussian(64)[1]
    op = operator(8, max_length=64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    found = op.matrix(k[:, :, order], k)[..., torch.arange(64), order].gt(0).double().mean().item()
    assert found > 0.6


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"num_planes": 31}, "`num_planes` must be 1 to 30"),
    ],
)
def test_bad_arguments_are_refused(overrides, message):
    arguments = {"block_size": 4, "num_planes": 7, "head_dim": 8, "num_heads": 2, "max_length": 16, "seed": 0}
    with pytest.raises(ValueError, match=message):
        HyperAttention(**{**arguments, **overrides})


def test_input_beyond_max_length_names_the_remedy():
    with pytest.raises(ValueError, match="beyond `max_length`=16: build with a larger one"):
        operator(max_length=16)(*gaussian(17))
