"""Bisection by principal axes: a permutation, of real points alone, whose runs are compact."""

import torch

from attnlens.linalg.principal_order import principal_order

COUNT = torch.ones(1, 5, 16, dtype=torch.float64)


def cloud(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def spread(keys, order, group):
    """Mean squared distance of the points to the means of the runs of `group`."""
    ordered = keys.take_along_dim(order[..., None], 2).unflatten(2, (-1, group))
    return (ordered - ordered.mean(3, keepdim=True)).square().sum(-1).mean()


def test_it_is_a_permutation_and_empty_points_come_last_and_weigh_nothing():
    keys, count = cloud(3, 5, 12, 4), torch.ones(3, 5, 12, dtype=torch.float64)
    count[:, :, [2, 7, 8, 11]] = 0
    order = principal_order(keys, count, 6)
    assert torch.equal(order.sort(-1).values, torch.arange(12).expand(3, 5, 12))
    filled = count.gather(2, order)
    assert filled[..., :6].all()
    louder = torch.where(count[..., None] > 0, keys, 1e6)
    real = order.gather(2, (~filled.bool()).int().argsort(dim=-1, stable=True))[..., :8]
    other = principal_order(louder, count, 6)
    again = other.gather(2, (count.gather(2, other) == 0).int().argsort(dim=-1, stable=True))[..., :8]
    assert torch.equal(real, again)


def test_four_clusters_come_out_whole():
    """Interleaved in the sequence, they are what consecutive runs mix."""
    centers = 20 * cloud(3, 5, 4, 6)
    keys = centers.repeat(1, 1, 4, 1) + 0.1 * cloud(3, 5, 16, 6)
    order = principal_order(keys, COUNT, 4)
    assert spread(keys, order, 4) < 0.1
    assert spread(keys, torch.arange(16).expand(3, 5, 16), 4) > 100


def test_runs_are_more_compact_than_consecutive_ones_on_gaussian_points():
    keys = cloud(3, 5, 16, 8)
    consecutive = torch.arange(16).expand(3, 5, 16)
    assert spread(keys, principal_order(keys, COUNT, 2), 2) < 0.85 * spread(keys, consecutive, 2)


def test_equal_points_keep_their_order():
    keys = torch.ones(2, 5, 16, 3, dtype=torch.float64)
    assert torch.equal(principal_order(keys, COUNT, 2), torch.arange(16).expand(2, 5, 16))
