"""Improved clustered attention: a loop over queries as oracle, the theorems behind the bound, groups by real length."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.softmax import softmax_naive, softmax_weights
from attnlens.linalg.kmeans import cluster_means, k_means
from attnlens.testing.inputs import EXACT, gaussian


def operator(**overrides):
    config = OmegaConf.load("conf/attention/clustered.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=128, seed=0, **overrides).double()


def lloyd(x, direction, num_clusters, iterations):
    """Members of every cluster of one head, token by token."""
    n = len(x)
    order = (x @ direction).argsort().tolist()
    centers = [x[order[(2 * g + 1) * n // (2 * num_clusters)]] for g in range(num_clusters)]
    for _ in range(iterations):
        members = [[] for _ in centers]
        for i in range(n):
            members[min(range(num_clusters), key=lambda c: float((x[i] - centers[c]).norm()))].append(i)
        centers = [x[rows].mean(0) if rows else center for rows, center in zip(members, centers, strict=True)]
    return [rows for rows in members if rows]


def loop_attention(q, k, v, op):
    """The definition of the output, one head and one query at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    scale, top_k = q.shape[-1] ** -0.5, min(op.top_k, k.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for rows in lloyd(q[b, h].detach(), op.direction[h], op.num_clusters, op.iterations):
                weights = torch.softmax(q[b, h, rows].mean(0) @ k[b, h].T * scale, -1)
                top = weights.argsort(descending=True)[:top_k]
                for i in rows:
                    own = torch.softmax(q[b, h, i] @ k[b, h, top].T * scale, -1)
                    row = weights.index_put((top,), weights[top].sum() * own)
                    out[b, h, i] = row @ v[b, h]
    return out


@pytest.mark.parametrize(
    ("length", "clusters", "top_k"), [(1, 3, 1), (5, 2, 2), (14, 4, 3), (21, 5, 7), (9, 20, 4), (12, 1, 5), (6, 2, 6)]
)
def test_equals_the_loop_forward_and_backward(length, clusters, top_k):
    op = operator(num_clusters=clusters, top_k=top_k)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(*inputs), loop_attention(*inputs, op)
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_rows_differ_as_the_queries_do(scale):
    """|softmax(s K q) - softmax(s K q^c)|_2 <= s |q - q^c| |K|_2 / 2, and l1 is below twice tanh of a quarter range."""
    q, k, _ = gaussian(40, logit_scale=scale)
    cluster, centers = k_means(q, operator().direction, 6, 5, None)
    center = centers.gather(2, cluster[..., None].expand_as(q))
    row, of_cluster = softmax_weights(q, k), softmax_weights(center, k)
    spectral = 8**-0.5 * (q - center).norm(dim=-1) * torch.linalg.matrix_norm(k, 2)[..., None] / 2
    assert ((row - of_cluster).norm(dim=-1) <= spectral + EXACT).all()
    shift = (q - center) @ k.mT * 8**-0.5
    width = shift.amax(-1) - shift.amin(-1)
    assert ((row - of_cluster).abs().sum(-1) <= 2 * torch.tanh(width / 4) + EXACT).all()


def test_recomputed_keys_bring_every_row_nearer_to_softmax():
    """In l1 and for every query, whatever the number of keys; all keys give softmax."""
    q, k, _ = gaussian(40, logit_scale=2.0)
    exact = softmax_weights(q, k)
    cluster, centers = k_means(q, operator().direction, 5, operator().iterations, None)
    of_cluster = softmax_weights(centers, k).gather(2, cluster[..., None].expand(-1, -1, -1, 40))
    most = (of_cluster - exact).abs().sum(-1)
    for top_k in (1, 4, 16, 40):
        found = (operator(num_clusters=5, top_k=top_k).matrix(q, k) - exact).abs().sum(-1)
        assert (found <= most + EXACT).all()
    assert found.max() < EXACT


def test_mass_outside_the_top_keys_is_kept():
    """Renormalizing over the top keys alone, without the cluster's remainder, is worse on smooth input."""
    q, k, v = gaussian(64)
    exact = softmax_naive(q, k, v)
    op = operator(num_clusters=4, top_k=8)
    weights = op.matrix(q, k)
    top = softmax_weights(q, k).topk(8, dim=-1)
    alone = torch.zeros_like(weights).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True)) @ v
    assert (op(q, k, v) - exact).norm() < 0.8 * (alone - exact).norm()
    assert weights.gt(0).all()


@pytest.mark.parametrize("clusters", [1, 4, 30])
def test_padding_anywhere_equals_the_run_without_it(clusters):
    """Clusters start at and are formed of real tokens, as many as the example itself has."""
    op = operator(num_clusters=clusters, top_k=3)
    q, k, v = gaussian(21)
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < 0.6
    poisoned = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v)]
    found = op(*poisoned, key_padding_mask=mask)
    for row in range(2):
        short = op(*(x[row : row + 1][:, :, mask[row]] for x in (q, k, v)))
        assert torch.allclose(found[row : row + 1][:, :, mask[row]], short, atol=EXACT)


def test_copies_of_four_queries_are_found_at_any_period():
    """The centroid is the query, exact with one recomputed key. Starts at even distances in the sequence would all
    fall on one of the four, and k-means does not recover from that."""
    q, k, v = gaussian(32)
    q = q[:, :, :4].repeat(1, 1, 8, 1)
    assert torch.allclose(operator(num_clusters=4, top_k=1)(q, k, v), softmax_naive(q, k, v), atol=EXACT)


def test_an_empty_cluster_keeps_its_center():
    x = gaussian(3)[0]
    start = gaussian(4, seed=1)[0]
    found = cluster_means(x, torch.tensor([0, 0, 4]).expand(2, 2, 3), start)
    assert torch.allclose(found[:, :, 0], x[:, :, :2].mean(2))
    assert torch.equal(found[:, :, 1:], start[:, :, 1:])


def test_heads_and_seeds_start_from_their_own_direction():
    config = OmegaConf.load("conf/attention/clustered.yaml")
    other = build(config, head_dim=8, num_heads=2, max_length=128, seed=1).double()
    assert not torch.equal(operator().direction[0], operator().direction[1])
    assert not torch.equal(operator().direction, other.direction)


@pytest.mark.parametrize("argument", ["top_k", "num_clusters", "iterations"])
def test_bad_arguments_are_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be at least 1, got 0"):
        operator(**{argument: 0})
