"""The Tucker decomposition against TensorLy: the same core and expansion, and an error near that of its iteration."""

import pytest
import torch

from attnlens.linalg.tucker import tucker
from tests.oracles.feed import optional


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_is_near_the_packages_higher_order_orthogonal_iteration(rank):
    tensorly, decomposition = optional("tensorly"), optional("tensorly.decomposition")
    x = torch.randn(1, 1, 5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = tucker(x, rank)
    core, factors = parts.core[0, 0].numpy(), [factor[0, 0].numpy() for factor in parts.factors]
    left = torch.from_numpy(tensorly.tucker_to_tensor((core, factors)))
    torch.testing.assert_close(parts.expand(3)[0, 0], left, atol=1e-12, rtol=0)
    best = tensorly.tucker_to_tensor(decomposition.tucker(x[0, 0].numpy(), rank=[rank] * 3, n_iter_max=500, tol=1e-12))
    ours, theirs = (x[0, 0] - left).norm(), (x[0, 0] - torch.from_numpy(best)).norm()
    assert theirs <= ours * (1 + 1e-9)
    assert ours <= 1.1 * theirs
