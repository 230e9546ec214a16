"""Medians against numpy, what is chosen on planted clusters, and that exactly s different real keys always are."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from attnlens.linalg.key_selection import KMeans, KMedian, Leverage
from attnlens.linalg.kmedian import cluster_medians, k_medians, nearest_l1
from attnlens.testing.inputs import gaussian

HEADS = {"head_dim": 4, "num_heads": 2, "seed": 0}
RULES = {"k-means": KMeans(**HEADS), "k-median": KMedian(**HEADS), "leverage": Leverage()}


def keys(n, seed=0):
    return torch.randn(2, 2, n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_medians_are_those_of_numpy_and_empty_clusters_keep_their_center():
    x, start = keys(30), keys(5, seed=1)
    cluster = torch.randint(0, 4, (2, 2, 30), generator=torch.Generator().manual_seed(2))
    cluster[..., -3:] = 5  # padding, one beyond the last
    found = cluster_medians(x, cluster, start)
    for b, h in np.ndindex(2, 2):
        for c in range(4):
            members = x[b, h, cluster[b, h] == c].numpy()
            np.testing.assert_allclose(found[b, h, c].numpy(), np.median(members, axis=0), atol=1e-14)
    assert torch.equal(found[:, :, 4], start[:, :, 4])


def test_an_iteration_never_raises_the_sum_of_distances():
    x = keys(300)
    direction = torch.ones(2, 4)
    sums = []
    for iterations in (1, 2, 4, 8):
        cluster, centers = k_medians(x, direction, 7, iterations, None)
        own = centers.gather(2, cluster[..., None].expand_as(x))
        sums.append((x - own).abs().sum((-1, -2)))
        brute = (x[:, :, :, None] - centers[:, :, None]).abs().sum(-1)
        assert (brute.gather(-1, nearest_l1(x, centers, None)[..., None])[..., 0] <= brute.amin(-1) + 1e-12).all()
    for before, after in pairwise(sums):
        assert (after <= before + 1e-9).all()


def test_the_median_is_drawn_less_by_a_far_key_than_the_mean():
    x = torch.zeros(1, 1, 11, 4, dtype=torch.float64)
    x[0, 0, 10] = 1e6
    cluster = torch.zeros(1, 1, 11, dtype=torch.long)
    assert (cluster_medians(x, cluster, x[:, :, :1]) == 0).all()


@pytest.mark.parametrize("rule", ["k-means", "k-median"])
def test_one_key_of_every_planted_cluster(rule):
    generator = torch.Generator().manual_seed(3)
    centers = 10 * torch.randn(2, 2, 6, 4, generator=generator, dtype=torch.float64)
    label = torch.arange(48) % 6
    x = centers[:, :, label] + 0.01 * torch.randn(2, 2, 48, 4, generator=generator, dtype=torch.float64)
    chosen = RULES[rule](x, 6, None)
    assert (label[chosen].sort(-1).values == torch.arange(6)).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1, 3, 8, 19, 20, 30])
def test_exactly_so_many_different_real_keys_wherever_padding_stands(rule, size):
    x = keys(20)
    x[:, :, 5:15] = x[:, :, 4:5]  # repeated keys leave clusters empty
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    x = torch.where(mask[:, None, :, None], x, 0)
    chosen = RULES[rule](x, size, mask)
    assert chosen.shape[-1] == min(size, 20)
    for b, h in np.ndindex(2, 2):
        count = min(size, int(mask[b].sum()))
        real = chosen[b, h, :count]
        assert mask[b, real].all()
        assert len(set(chosen[b, h].tolist())) == min(size, 20)
        short = RULES[rule](x[b : b + 1][:, :, mask[b]], size, None)
        assert torch.equal(mask[b].nonzero()[:, 0][short[0, h]], real)


def test_leverage_takes_the_only_key_of_a_direction():
    x = torch.zeros(1, 1, 9, 4, dtype=torch.float64)
    x[..., 0] = torch.linspace(5, 6, 9, dtype=torch.float64)
    x[0, 0, 6, 2] = 0.1
    assert 6 in Leverage()(x, 1, None)[0, 0]


def test_equally_far_keys_are_chosen_by_position_whatever_the_round_off():
    """A GPU took the other key of a cluster of two: both are as far from their mean, up to the last bit."""
    k = gaussian(30)[0]
    base = KMeans(head_dim=8, num_heads=2, seed=0)(k, 12, None)
    for draw in range(5):
        noise = torch.randn(k.shape, generator=torch.Generator().manual_seed(draw), dtype=k.dtype)
        assert torch.equal(KMeans(head_dim=8, num_heads=2, seed=0)(k * (1 + 1e-13 * noise), 12, None), base)


def test_repeated_keys_are_chosen_by_position_whatever_the_padding():
    """Independent tokens, each repeated: all scores are one over a whole number, and 12 of 30 choices moved with the
    shape of the padded input."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        length = 150 + 37 * seed
        tokens = torch.randn(1, 2, 20, 64, generator=generator, dtype=torch.float64)
        x = tokens[:, :, torch.randint(0, 20, (length,), generator=generator)]
        mask = torch.rand(1, length, generator=generator) < 0.7
        padded = Leverage()(torch.where(mask[:, None, :, None], x, 0), 30, mask)
        assert torch.equal(padded, mask[0].nonzero()[:, 0][Leverage()(x[:, :, mask[0]], 30, None)])
