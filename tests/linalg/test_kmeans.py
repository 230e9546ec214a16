"""k-means, at once and online: against loops, with padding, and that a later block changes nothing before it."""

import pytest
import torch

from attnlens.linalg.kmeans import cluster_means, k_means, nearest, spread_rows
from attnlens.linalg.online_kmeans import online_k_means
from attnlens.testing.inputs import EXACT, gaussian

DIRECTION = torch.randn(2, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def inertia(x, cluster, num_clusters):
    """Sum of squared distances of real rows from the mean of their cluster, every head on its own."""
    centers = cluster_means(x, cluster, torch.zeros_like(x[:, :, :1]).expand(-1, -1, num_clusters, -1))
    at = cluster.clamp_max(num_clusters - 1)[..., None].expand_as(x)
    return ((x - centers.gather(2, at)).square().sum(-1) * (cluster < num_clusters)).sum(-1)


def test_nearest_is_the_nearest_and_the_first_of_equal_ones():
    x, centers = gaussian(30)[0], gaussian(6, seed=1)[0]
    assert torch.equal(nearest(x, centers, None), torch.cdist(x, centers).argmin(-1))
    twice = torch.cat([centers, centers], 2)
    assert torch.equal(nearest(x, twice, None), nearest(x, centers, None))
    alive = torch.tensor([[True, False, True, True, False, True]]).expand(2, -1)
    found = nearest(x, centers, None, alive)
    apart = torch.cdist(x, centers).masked_fill(~alive[:, None, None], torch.inf)
    assert torch.equal(found, apart.argmin(-1))


def test_means_are_means_and_padding_enters_none():
    x = gaussian(30)[0]
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.7
    cluster, centers = k_means(x, DIRECTION, 4, 3, mask)
    assert torch.equal(cluster == 4, ~mask[:, None].expand_as(cluster))
    for b in range(2):
        for h in range(2):
            for c in range(4):
                rows = x[b, h][cluster[b, h] == c]
                assert torch.allclose(centers[b, h, c], rows.mean(0), atol=EXACT)


@pytest.mark.parametrize("online", [False, True])
def test_more_iterations_never_widen_the_clusters(online):
    x = gaussian(32)[0]
    before = None
    for iterations in (1, 2, 3, 5, 9):
        cluster = (
            online_k_means(x, DIRECTION, 32, 6, iterations, None)[-1]
            if online
            else k_means(x, DIRECTION, 6, iterations, None)[0]
        )
        after = inertia(x, cluster, 6)
        assert before is None or (after <= before + EXACT).all()
        before = after


def test_one_block_is_k_means():
    x = gaussian(20)[0]
    mask = torch.arange(20) < torch.tensor([20, 13])[:, None]
    for real in (None, mask):
        assert torch.equal(online_k_means(x, DIRECTION, 20, 5, 3, real)[0], k_means(x, DIRECTION, 5, 3, real)[0])


def test_a_version_depends_on_the_blocks_up_to_it():
    x, other = gaussian(24)[0], gaussian(24, seed=1)[0]
    changed = torch.cat([x[:, :, :16], 9 * other[:, :, 16:]], 2)
    versions, others = (online_k_means(y, DIRECTION, 8, 3, 3, None) for y in (x, changed))
    assert [v.shape[2] for v in versions] == [8, 16, 24]
    assert all(torch.equal(versions[g], others[g]) for g in range(2))
    assert not torch.equal(versions[2], others[2])


def test_append_is_the_running_mean_and_refinement_a_step_of_lloyd():
    """Token by token on one head: assignments of the appended rows, means over old and new, then all rows once more."""
    x = gaussian(12, batch=1)[0]
    first, appended = online_k_means(x, DIRECTION, 6, 2, 1, None)
    refined = online_k_means(x, DIRECTION, 6, 2, 2, None)
    assert torch.equal(appended[:, :, :6], first)
    # With one iteration the first block is not refined either: the two runs differ from there on.
    old = cluster_means(x[:, :, :6], first, torch.zeros(1, 2, 2, 8, dtype=torch.float64))
    centers = torch.cat([old, spread_rows(x[:, :, 6:], DIRECTION, 2, None)], 2)
    assert torch.equal(appended[:, :, 6:], torch.cdist(x[:, :, 6:], centers).argmin(-1))

    before = cluster_means(x[:, :, :6], refined[0], torch.zeros(1, 2, 2, 8, dtype=torch.float64))
    centers = torch.cat([before, spread_rows(x[:, :, 6:], DIRECTION, 2, None)], 2)
    label = torch.cdist(x[:, :, 6:], centers).argmin(-1)
    for h in range(2):
        means, count = list(centers[0, h]), [int((refined[0][0, h] == c).sum()) for c in range(2)] + [0, 0]
        for j, c in enumerate(label[0, h].tolist(), start=6):
            means[c] = means[c] * (count[c] / (count[c] + 1)) + x[0, h, j] / (count[c] + 1)
            count[c] += 1
        expected = torch.cdist(x[0, h], torch.stack(means)).argmin(-1)
        assert torch.equal(refined[1][0, h], expected)


def test_a_block_of_padding_starts_no_cluster():
    """Its centers would stand at rows that are no tokens, and take the tokens of other blocks."""
    x = gaussian(24)[0]
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[:, 8:16] = False
    x = torch.where(mask[:, None, :, None], x, 0)
    last = online_k_means(x, DIRECTION, 8, 3, 4, mask)[-1]
    assert not ((last >= 3) & (last < 6)).any()
    joined = online_k_means(x[:, :, mask[0]], DIRECTION, 8, 3, 4, None)[-1]
    real = last[:, :, mask[0]]
    assert torch.equal(torch.where(real >= 6, real - 3, real), joined)


def test_a_nan_row_stays_in_range_and_in_its_head():
    x = gaussian(20)[0]
    expected = k_means(x, DIRECTION, 4, 3, None)[0]
    x[0, 1, 3] = torch.nan
    found = k_means(x, DIRECTION, 4, 3, None)[0]
    assert ((found >= 0) & (found < 4)).all()
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0, 0], expected[0, 0])
