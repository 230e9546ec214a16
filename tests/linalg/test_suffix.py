"""Attention of the last tokens over shared keys and values, against the dense causal form."""

import pytest
import torch

from attnlens.linalg.dense import softmax_naive
from attnlens.linalg.suffix import repeat_groups, suffix_attention


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("n", [1, 3, 9])
def test_equals_the_last_rows_of_the_causal_run(groups, n):
    torch.manual_seed(0)
    q = torch.randn(2, 6, 9, 4, dtype=torch.float64)
    k, v = torch.randn(2, groups, 9, 4, dtype=torch.float64), torch.randn(2, groups, 9, 5, dtype=torch.float64)
    repeated = k.repeat_interleave(6 // groups, 1), v.repeat_interleave(6 // groups, 1)
    expected = softmax_naive(q, *repeated, causal=True)[:, :, -n:]
    torch.testing.assert_close(suffix_attention(q[:, :, -n:], k, v), expected)
    torch.testing.assert_close(
        suffix_attention(q[:, :, -n:], k, v, scale=0.3),
        softmax_naive(q * 0.3 * 2, *repeated, causal=True)[:, :, -n:],
    )


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_are_those_of_the_dense_form(width, n):
    torch.manual_seed(0)
    shapes = (2, 6, n, 4), (2, 2, 7, 4), (2, 2, 7, width)
    q, k, v = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    gradient = torch.randn(2, 6, n, width, dtype=torch.float64)
    found = torch.autograd.grad(suffix_attention(q, k, v), (q, k, v), gradient)
    padded = torch.cat([q.new_zeros(2, 6, 7 - n, 4), q], 2)
    dense = softmax_naive(padded, *(repeat_groups(x, 6) for x in (k, v)), causal=True)[:, :, -n:]
    torch.testing.assert_close(found, torch.autograd.grad(dense, (q, k, v), gradient))


@pytest.mark.parametrize("width", [4, 5])
def test_a_nan_query_gives_nan_in_its_row_alone(width):
    """The kernel of one token answers it with zeros."""
    q, k, v = torch.randn(1, 4, 1, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, width)
    q[0, 1, 0, 2] = torch.nan
    assert torch.equal(suffix_attention(q, k, v).isnan().all(-1).flatten(), torch.tensor([False, True, False, False]))


@pytest.mark.parametrize("width", [8, 6])
def test_half_precision_keeps_its_scores_in_float32(width):
    torch.manual_seed(0)
    q, k, v = 6 * torch.randn(1, 4, 1, 8), 6 * torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, width)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    exact = suffix_attention(q.double(), k.double(), v.double())
    out = suffix_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 2 * 2**-8 * v.abs().max()


def test_groups_are_repeated_in_blocks_and_not_where_there_is_one_a_head():
    x = torch.randn(1, 2, 3, 4)
    assert repeat_groups(x, 2) is x
    assert torch.equal(repeat_groups(x, 4)[:, 1], x[:, 0])
    assert torch.equal(repeat_groups(x, 4)[:, 2], x[:, 1])
