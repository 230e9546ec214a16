"""Column sums of attention, against the dense weights."""

import pytest
import torch

from attnlens.linalg import column_mass as module
from attnlens.linalg.column_mass import column_mass
from attnlens.linalg.dense import softmax_weights
from attnlens.linalg.suffix import repeat_groups


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 4, 11])
@pytest.mark.parametrize("block", [3, 256])
def test_sums_the_last_rows_of_every_head_of_a_group(groups, n, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 11, 5, dtype=torch.float64), torch.randn(2, groups, 11, 5, dtype=torch.float64)
    weights = softmax_weights(q, repeat_groups(k, 4), causal=True)[:, :, -n:]
    expected = weights.sum(2).unflatten(1, (groups, -1)).sum(2)
    found = column_mass(q[:, :, -n:], k)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.full((2, groups), n * 4.0 / groups, dtype=torch.float64))
