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


def test_groups_are_repeated_in_blocks_and_not_where_there_is_one_a_head():
    x = torch.randn(1, 2, 3, 4)
    assert repeat_groups(x, 2) is x
    assert torch.equal(repeat_groups(x, 4)[:, 1], x[:, 0])
    assert torch.equal(repeat_groups(x, 4)[:, 2], x[:, 1])
