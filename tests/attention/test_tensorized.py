"""Tensorized attention: against the whole tensor, 2-D prefix sums, averaged cores, the length it is made for."""

import math

import pytest
import torch

from attnlens.analysis.flops import measure_flops
from attnlens.attention.tensorized import Tensorized, causal_tensorized, tensorized_attention, tensorized_naive
from attnlens.testing.inputs import HEADS, gaussian


def _parameters(length, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, dim), (HEADS, length, length, dim))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_the_tensor_is_the_sum_over_r_and_places_up_to_the_query():
    """One head of one example by loops, causal."""
    q, k, v = (x[:1, :1] for x in gaussian(4, head_dim=3))
    core, weight = (x[:1] for x in _parameters(4, 3))
    found = tensorized_naive(q, k, v, core, weight, causal=True)[0, 0]
    for i in range(4):
        row = torch.zeros(3, dtype=torch.float64)
        for j in range(i + 1):
            for m in range(i + 1):
                row += (
                    sum(core[0, r] * q[0, 0, i, r] * k[0, 0, j, r] * v[0, 0, m, r] for r in range(3)) * weight[0, j, m]
                )
        torch.testing.assert_close(found[i], row, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_without_the_tensor_equals_with_it_forward_and_backward(length, causal):
    inputs = [x.requires_grad_() for x in (*gaussian(length), *_parameters(length))]
    exact = tensorized_naive(*inputs, causal=causal)
    found = (causal_tensorized if causal else tensorized_attention)(*inputs)
    torch.testing.assert_close(found, exact, atol=1e-10, rtol=1e-10)
    expected = torch.autograd.grad(exact.square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(found.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-9)


def test_the_last_causal_row_reads_all_pairs():
    inputs = (*gaussian(17), *_parameters(17))
    torch.testing.assert_close(causal_tensorized(*inputs)[:, :, -1], tensorized_attention(*inputs)[:, :, -1])


def test_averaged_blocks_with_shared_inputs_are_one_block_with_the_mean_core():
    """The average over h of sum_r g^(h)_r ... is linear in g: blocks that share q, k and v add nothing."""
    q, k, v = gaussian(9)
    cores = torch.stack([_parameters(9, seed=seed)[0] for seed in range(4)])
    _, weight = _parameters(9)
    average = torch.stack([tensorized_attention(q, k, v, core, weight) for core in cores]).mean(0)
    torch.testing.assert_close(average, tensorized_attention(q, k, v, cores.mean(0), weight))


def test_it_is_linear_in_each_argument():
    (q, k, v), (core, weight) = gaussian(9), _parameters(9)
    other = gaussian(9, seed=1)
    for place in range(3):
        args = [q, k, v]
        mixed, second = list(args), list(args)
        mixed[place] = 2 * args[place] - 3 * other[place]
        second[place] = other[place]
        expected = 2 * tensorized_attention(*args, core, weight) - 3 * tensorized_attention(*second, core, weight)
        torch.testing.assert_close(tensorized_attention(*mixed, core, weight), expected, atol=1e-9, rtol=1e-10)


def test_a_shorter_input_reads_the_first_block_of_w_and_a_longer_one_is_refused():
    operator = Tensorized(8, HEADS, 12, seed=0).double()
    q, k, v = gaussian(7)
    expected = tensorized_naive(q, k, v, operator.core, operator.weight[:, :7, :7])
    torch.testing.assert_close(operator(q, k, v), expected, atol=1e-12, rtol=1e-10)
    with pytest.raises(ValueError, match="at most `max_length` 12 tokens, got 13"):
        operator(*gaussian(13))
    with pytest.raises(ValueError, match="2 heads of 8 and values no wider, got 2 heads of 8 and values of 9"):
        operator(*gaussian(5, value_dim=9))
    with pytest.raises(ValueError, match="no matrix of queries by keys"):
        operator.matrix(q, k)


def test_unit_gaussian_inputs_of_the_longest_length_start_with_unit_variance():
    """Over 40 draws of the parameters and 64 outputs each; the product of six Gaussians spreads widely."""
    squares = []
    for seed in range(40):
        operator = Tensorized(16, HEADS, 12, seed=seed).double()
        squares.append(operator(*gaussian(12, head_dim=16, seed=seed)).square().mean())
    squares = torch.stack(squares)
    assert (squares.mean() - 1).abs() < 5 * squares.std() / len(squares) ** 0.5


@pytest.mark.parametrize("causal", [False, True])
def test_cost_is_quadratic(causal):
    flops = []
    for length in (64, 128):
        operator = Tensorized(8, HEADS, length, seed=0)
        inputs = gaussian(length, batch=1, dtype=torch.float32)
        flops.append(measure_flops(lambda *x, f=operator: f(*x, causal=causal), *inputs).flops)
    assert 1.85 < math.log2(flops[1] / flops[0]) < 2.02
