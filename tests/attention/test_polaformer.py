"""PolaFormer: the identity of its streams, the definition pair by pair, signs, gates, the matrix, the cost."""

import itertools
import math

import pytest
import torch

from attnlens.analysis.budget import operator_flops
from attnlens.attention.polaformer import PolaFormer, polaformer_naive
from attnlens.testing.inputs import gaussian

MASK = torch.arange(70) < torch.tensor([70, 31])[:, None]


def operator(alpha=4, head_dim=8, randomize=True):
    op = PolaFormer(head_dim, 2, alpha).double()
    if randomize:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in op.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.5)
    return op


def test_the_streams_differ_by_the_inner_product_at_exponent_one():
    q, k, _ = gaussian(30)
    same, opposite, keys = operator(alpha=0, randomize=False)._streams(q, k)
    torch.testing.assert_close((same - opposite) @ keys.mT, q @ k.mT, atol=1e-13, rtol=1e-12)
    assert (same @ keys.mT >= 0).all()
    assert (opposite @ keys.mT >= 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value_dim", [5, 8, 1])
def test_sums_first_equal_the_definition_forward_and_backward(value_dim, causal):
    tensors = [x.requires_grad_() for x in gaussian(70, value_dim=value_dim)]
    op = operator()
    leaves = [*tensors, *op.parameters()]
    for mask in (None, MASK):
        found = op(*tensors, causal=causal, key_padding_mask=mask)
        expected = op.reference(*tensors, causal=causal, key_padding_mask=mask)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
        cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        pulled = [torch.autograd.grad((out * cotangent).sum(), leaves) for out in (found, expected)]
        for a, b in zip(*pulled, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def test_signs_decide_the_stream():
    """A key equal to the query is alone in the same-sign stream, its negative alone in the opposite one."""
    q = torch.ones(1, 2, 1, 8, dtype=torch.float64)
    k = torch.cat([q, -q], 2)
    v = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).expand(1, 2, 2, 2)
    out = operator(randomize=False)(q, k, v)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([1.0, 4.0], dtype=torch.float64))


def test_a_row_without_a_key_of_its_signs_is_zero_and_has_a_finite_gradient():
    q = torch.ones(1, 2, 1, 8, dtype=torch.float64, requires_grad=True)
    v = torch.ones(1, 2, 1, 4, dtype=torch.float64)
    out = operator(randomize=False)(q, -q.detach(), v)
    assert (out[..., :2] == 0).all()
    torch.testing.assert_close(out[..., 2:], v[..., 2:])
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_exponents_lie_between_one_and_one_plus_alpha_and_sharpen():
    """Learned a channel at a time; a larger exponent gives large entries more of the weight."""
    q, k, _ = gaussian(40)
    sharpness = []
    for level in (-50.0, 0.0, 50.0):
        op = operator(randomize=False)
        torch.nn.init.constant_(op.exponent, level)
        positive, _ = op._polarized(torch.full((1, 2, 1, 8), 2.0, dtype=torch.float64))
        assert (positive >= 2 - 1e-9).all()
        assert (positive <= 2**5 + 1e-9).all()
        sharpness.append(op.matrix(q, k).square().sum(-1).mean())
    assert sharpness[0] < sharpness[1] < sharpness[2]


@pytest.mark.parametrize("causal", [False, True])
def test_the_matrix_is_the_mean_of_both_streams(causal):
    q, k, _ = gaussian(12)
    op = operator(randomize=False)
    eye = torch.eye(12, dtype=torch.float64).expand(2, 2, 12, 12)
    streams = polaformer_naive(op._polarized(q), op._polarized(k), torch.cat([eye, eye], -1), causal=causal)
    weights = op.matrix(q, k, causal=causal)
    torch.testing.assert_close(weights, (streams[0] + streams[1]) / 2, atol=1e-13, rtol=1e-10)
    assert (weights >= 0).all()
    assert (weights.sum(-1) <= 1 + 1e-12).all()


@pytest.mark.parametrize("causal", [False, True])
def test_cost_is_linear_in_the_length(causal):
    op = operator(head_dim=64)
    costs = [operator_flops(op, *gaussian(n, batch=1, head_dim=64), causal=causal) for n in (1024, 2048, 4096)]
    slopes = [math.log2(b / a) for a, b in itertools.pairwise(costs)]
    assert all(abs(slope - 1) < 0.03 for slope in slopes), slopes


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`alpha` must be at least 0, got -1"):
        PolaFormer(8, 2, -1)
    with pytest.raises(ValueError, match="`num_heads`"):
        PolaFormer(8, 3)(*gaussian(4))
