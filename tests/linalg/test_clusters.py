"""Opening clusters within a budget, two levels of them, and windowed positions: against loops."""

import pytest
import torch

from attnlens.linalg.clusters import (
    PASSES,
    centroid_attention,
    clusters_of_clusters,
    clusters_of_keys,
    one_level,
    open_best,
    two_levels,
)
from attnlens.linalg.kmeans import k_means
from attnlens.linalg.partial import partial_attention
from attnlens.linalg.windowed_rope import windowed_rotation
from attnlens.position.rope import Rope
from attnlens.testing.inputs import EXACT, gaussian

DIRECTION = torch.randn(2, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def some_clusters(length=40, num_clusters=7, mask=None):
    q, k, v = gaussian(length, value_dim=5)
    cluster, _ = k_means(k, DIRECTION, num_clusters, 4, mask)
    return q, k, v, cluster, clusters_of_keys(k, v, cluster, num_clusters)


def greedy(scores, sizes, budget):
    order = sorted(range(len(scores)), key=lambda c: -scores[c])
    opened, left = [], budget
    for _ in range(PASSES):
        for c in [c for c in order if c not in opened and 0 < sizes[c] <= left]:
            if sizes[c] > left:
                break
            opened.append(c)
            left -= sizes[c]
    return set(opened)


@pytest.mark.parametrize("slots", [1, 4, 11, 25, 40])
def test_opens_in_order_of_score_what_fits(slots):
    _, _, _, cluster, found = some_clusters()
    score = gaussian(9, head_dim=7, seed=2)[0]
    opened = open_best(score, found.members[:, :, None], found.start[:, :, None], found.order, slots)
    for b in range(2):
        for h in range(2):
            sizes = found.size[b, h].tolist()
            for i in range(9):
                best = greedy(score[b, h, i].tolist(), sizes, slots)
                assert {c for c in opened.clusters[b, h, i].nonzero()[:, 0].tolist() if sizes[c]} == best
                keys = opened.members[b, h, i][opened.filled[b, h, i]].tolist()
                assert sorted(keys) == [j for j in range(40) if cluster[b, h, j].item() in best]


def test_one_cluster_beyond_the_budget_does_not_close_all():
    """Stopping at the first cluster that does not fit leaves the budget unused as soon as it is the best one."""
    score, members = torch.tensor([[[[2.0, 1.0, 0.0]]]]), torch.tensor([[[[5, 1, 2]]]])
    opened = open_best(score, members, members.cumsum(-1) - members, torch.arange(8).view(1, 1, 8), 3)
    assert opened.clusters[0, 0, 0].tolist() == [False, True, True]
    assert opened.members[0, 0, 0].tolist() == [5, 6, 7]


def test_coarse_means_count_keys():
    """Mean and size of a cluster of clusters are those of the keys below, so that its mass stays below theirs."""
    mask = torch.arange(40) < torch.tensor([40, 23])[:, None]
    q, k, v, cluster, fine = some_clusters(num_clusters=12, mask=mask)
    coarse = clusters_of_clusters(fine, DIRECTION, 3, 4)
    for b in range(2):
        for h in range(2):
            for p in range(3):
                start, members = coarse.start[b, h, p], coarse.members[b, h, p]
                below = coarse.order[b, h, start : start + members].tolist()
                keys = [j for j in range(40) if cluster[b, h, j].item() in below]
                assert coarse.size[b, h, p] == len(keys)
                assert torch.allclose(coarse.centers[b, h, p], k[b, h, keys].mean(0), atol=EXACT)
                assert torch.allclose(coarse.values[b, h, p], v[b, h, keys].mean(0), atol=EXACT)
                true = (8**-0.5 * q[b, h] @ k[b, h, keys].T).logsumexp(-1)
                mass = coarse.size[b, h, p].log() + 8**-0.5 * q[b, h] @ coarse.centers[b, h, p]
                assert (mass <= true + EXACT).all()


@pytest.mark.parametrize("num_clusters", [12, 200])
def test_two_levels_with_room_for_all_are_one(num_clusters):
    """Also beyond the size up to which chosen clusters are a mask for the fused kernel."""
    q, _, _, _, fine = some_clusters(240, num_clusters)
    coarse = clusters_of_clusters(fine, DIRECTION, 4, 3)
    one, two = one_level(q, fine, 9, True), two_levels(q, coarse, fine, num_clusters, 9, True)
    assert torch.allclose(one.far[0], two.far[0], atol=EXACT)
    assert torch.allclose(one.far[1], two.far[1], atol=EXACT)
    sets = [torch.where(x.keys.filled, x.keys.members, -1).sort(-1).values for x in (one, two)]
    assert torch.equal(*sets)


def test_no_cluster_left_gives_an_empty_row():
    q, _, _, _, fine = some_clusters()
    out, lse = centroid_attention(q, fine, torch.zeros(*q.shape[:3], 7, dtype=torch.bool))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_windowed_scores_are_those_at_one_distance():
    q, k, _ = gaussian(20)
    rope = Rope(8, 20, base=50.0).double()
    far, still = windowed_rotation(*rope.rotate(q, k), 50.0, 6)
    assert torch.allclose(still, k, atol=1e-6)
    scores, rotated = far @ still.mT, torch.einsum("bhid,bhjd->bhij", *rope.rotate(q, k))
    for i in range(6, 20):
        assert torch.allclose(scores[:, :, i, i - 6], rotated[:, :, i, i - 6], atol=1e-5)
    moved = torch.cat([rope.rotate(x, x, offset=6)[0] for x in q.split(1, 2)], 2)
    assert torch.allclose(scores, moved @ k.mT, atol=1e-5)
    theta = 50.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    gap = torch.arange(20)[:, None] - torch.arange(20) - 6
    planes = [x.unflatten(-1, (2, 4)).norm(dim=-2) for x in (q, k)]
    swing = 2 * (gap[..., None] * theta / 2).sin().abs()
    bound = torch.einsum("ijp,bhip,bhjp->bhij", swing, *planes)
    assert ((scores - rotated).abs() <= bound + 1e-5).all()


def test_chosen_clusters_keep_their_sizes():
    """log N enters as a coordinate of the centers: the far part equals that with N as a bias."""
    q, _, _, _, fine = some_clusters()
    coarse = clusters_of_clusters(fine, DIRECTION, 1, 2)
    far, lse = two_levels(q, coarse, fine, 7, 0, True).far
    expected = partial_attention(q, fine.centers, fine.values, bias=fine.size.double().log()[:, :, None])
    assert torch.allclose(far, expected[0], atol=EXACT)
    assert torch.allclose(lse, expected[1], atol=EXACT)
