"""Quantization: half a step, bytes that hold all codes, and what that makes of the outputs."""

import pytest
import torch

from attnlens.linalg.dense import softmax_naive
from attnlens.linalg.quantization import dequantize, output_bound, pack, quantize, unpack


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 5, 8, 64])
def test_packing_is_lossless_and_as_small_as_it_says(bits, width):
    codes = torch.randint(0, 2**bits, (3, 2, 7, width), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, 7, -(-width * bits // 8))
    assert torch.equal(unpack(packed, bits, width), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [-1, -2])
def test_every_entry_is_within_half_a_step_and_the_ends_are_exact(bits, axis):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64) * torch.logspace(-3, 3, 12)
    coded = quantize(x, bits, axis=axis)
    found = dequantize(coded, bits, torch.empty_like(x))
    error = ((found - x).abs() / (coded.step / 2)).max()
    assert 0.9 < error <= 1 + 1e-9
    for end in (torch.amin, torch.amax):
        torch.testing.assert_close(end(found, axis), end(x, axis), rtol=1e-12, atol=1e-9)


def test_a_constant_is_exact_and_halves_are_ranged_in_float32():
    x = torch.full((1, 1, 4, 6), 0.3)
    assert torch.equal(dequantize(quantize(x, 2, axis=-1), 2, torch.empty_like(x)), x)
    assert quantize(x.bfloat16(), 4, axis=-1).step.dtype == torch.float32


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
def test_the_outputs_obey_the_bound_of_their_numbers(size):
    """The worst of 200 draws of signs stays below it, and not far below."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 6, dtype=torch.float64) for n in (5, 9, 9))
    key_slack, value_slack = size * torch.rand_like(k), size * torch.rand(1, 2, 9, 1, dtype=torch.float64)
    bound = output_bound(q, v, key_slack, value_slack)
    exact, worst = softmax_naive(q, k, v), torch.zeros_like(bound)
    for _ in range(200):
        signs = [torch.randint_like(x, 0, 2) * 2 - 1 for x in (k, v)]
        out = softmax_naive(q, k + key_slack * signs[0], v + value_slack * signs[1])
        worst = worst.maximum((out - exact).norm(dim=-1))
    assert (worst <= bound).all()
    assert (bound < 20 * worst).all()
