"""Routing: a loop over tokens as oracle, no row without output, no leak, centroids that learn in training mode only."""

import copy
import itertools

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.routing import nearest_centroid
from attnlens.testing.inputs import EXACT, gaussian

CAUSAL = pytest.mark.parametrize("causal", [False, True])


def operator(seed=0, **overrides):
    config = OmegaConf.load("conf/attention/routing.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=128, seed=seed, **overrides).double()


def nearest(x, centroids):
    """The number of the centroid at the smallest distance from the row with mean 0 and variance 1."""
    x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    return min(range(len(centroids)), key=lambda c: float((x - centroids[c]).norm()))


def seen_by(i, q, k, op, centroids, causal):
    """P_i of one head, from its definition."""
    cluster = nearest(q[i], centroids)
    keys = [j for j in range(len(k)) if nearest(k[j], centroids) == cluster]
    chunk = max(sum(j <= i for j in keys) - 1, 0) // op.chunk_size
    found = {j for rank, j in enumerate(keys) if chunk - rank // op.chunk_size in (0, 1) and (j <= i or not causal)}
    return sorted(found | {i})


def loop_attention(q, k, v, op, causal):
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, i in itertools.product(*(range(size) for size in q.shape[:3])):
        seen = seen_by(i, q[b, h].detach(), k[b, h].detach(), op, op.centroids[h], causal)
        out[b, h, i] = torch.softmax(k[b, h, seen] @ q[b, h, i] * q.shape[-1] ** -0.5, -1) @ v[b, h, seen]
    return out


@CAUSAL
@pytest.mark.parametrize(
    ("length", "chunk", "clusters"), [(1, 2, 2), (7, 1, 2), (13, 2, 3), (22, 3, 2), (18, 4, 1), (12, 20, 2), (17, 2, 9)]
)
def test_equals_the_loop_forward_and_backward(length, chunk, clusters, causal):
    op = operator(chunk_size=chunk, num_clusters=clusters)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(*inputs, causal=causal), loop_attention(*inputs, op, causal)
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@CAUSAL
def test_no_row_is_left_without_weights(causal):
    """A centroid that takes the nearest w tokens, as published, leaves those that none takes at zero; here a query
    whose cluster has no key at all still has its own."""
    q, k, _ = gaussian(40)
    far = operator(num_clusters=2)
    k = 0.01 * k + far.centroids[:, :1]
    q = 0.01 * q + far.centroids[:, 1:]
    weights = far.matrix(q, k, causal=causal)
    assert torch.allclose(weights, torch.eye(40, dtype=torch.float64).expand_as(weights))
    for op in (operator(chunk_size=1), operator(num_clusters=30)):
        sums = op.matrix(*gaussian(64)[:2], causal=causal).sum(-1)
        assert torch.allclose(sums, torch.ones_like(sums))


def test_causal_output_of_a_prefix_is_that_of_the_whole():
    """Membership by the nearest centroid and rank among the past; the top w of all tokens would change."""
    op = operator(chunk_size=3, num_clusters=4)
    q, k, v = gaussian(70)
    whole = op(q, k, v, causal=True)
    for n in (1, 7, 33, 64, 69):
        assert torch.allclose(op(*(x[:, :, :n] for x in (q, k, v)), causal=True), whole[:, :, :n], atol=EXACT)


@CAUSAL
def test_padding_anywhere_equals_the_run_without_it(causal):
    op = operator(chunk_size=3, num_clusters=4)
    q, k, v = gaussian(31)
    mask = torch.rand(2, 31, generator=torch.Generator().manual_seed(1)) < 0.6
    poisoned = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v)]
    found = op(*poisoned, causal=causal, key_padding_mask=mask)
    for row in range(2):
        short = op(*(x[row : row + 1][:, :, mask[row]] for x in (q, k, v)), causal=causal)
        assert torch.allclose(found[row : row + 1][:, :, mask[row]], short, atol=EXACT)


@CAUSAL
def test_materialized_pairs_are_those_of_the_fast_form(causal):
    q, k, _ = gaussian(50)
    op = operator(chunk_size=4, num_clusters=3)
    assert torch.equal(op.matrix(q, k, causal=causal) > 0, op.visible(q, k, None, causal))


def test_centroids_move_to_the_mean_of_their_members_in_training_only():
    q, k, v = gaussian(40)
    op = operator(num_clusters=4, decay=0.9)
    before = op.centroids.clone()
    tokens = torch.cat([q, k], 2)
    cluster = nearest_centroid(tokens, before)
    out = op.eval()(q, k, v)
    assert torch.equal(op.centroids, before)
    # The output comes first: training and evaluation mode agree on equal centroids.
    assert torch.equal(op.train()(q, k, v), out)
    normal = torch.nn.functional.layer_norm(tokens, (8,))
    for h, c in itertools.product(range(2), range(4)):
        members = normal[:, h][cluster[:, h] == c]
        expected = 0.9 * before[h, c] + 0.1 * members.mean(0) if len(members) else before[h, c]
        assert torch.allclose(op.centroids[h, c], expected)
    assert not torch.equal(op.centroids, before)
    frozen = operator(num_clusters=4, decay=1.0)
    start = frozen.centroids.clone()
    frozen.train()(q, k, v)
    assert torch.equal(frozen.centroids, start)


def test_padding_does_not_move_centroids():
    q, k, v = gaussian(20)
    mask = torch.arange(20) < torch.tensor([20, 7])[:, None]
    ops = [operator(decay=0.5) for _ in range(2)]
    for op, fill in zip(ops, (0.0, 9.0), strict=True):
        op(*(x.masked_fill(~mask[:, None, :, None], fill) for x in (q, k, v)), key_padding_mask=mask)
    assert torch.equal(ops[0].centroids, ops[1].centroids)


def test_learned_centroids_keep_more_mass():
    """Queries and keys around six directions: after 60 batches the kept softmax mass is larger than with the draw."""
    generator = torch.Generator().manual_seed(0)
    topics = 3 * torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)

    def batch():
        topic = torch.randint(6, (2, 96), generator=generator)
        noise = 0.3 * torch.randn(2, 2, 2, 96, 8, generator=generator, dtype=torch.float64)
        return topics[:, topic].transpose(0, 1) + noise[0], topics[:, topic].transpose(0, 1) + noise[1]

    op = operator(num_clusters=6, chunk_size=8, decay=0.8)
    drawn = copy.deepcopy(op).eval()
    for _ in range(60):
        q, k = batch()
        op(q, k, k)
    q, k = batch()
    weights = torch.softmax(q @ k.mT * 8**-0.5, -1)
    kept = [(weights * each.eval().visible(q, k, None, False)).sum(-1).mean().item() for each in (drawn, op)]
    assert kept[1] > kept[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"num_clusters": 0}, "`num_clusters` must be at least 1, got 0"),
        ({"decay": 0.0}, "`decay` must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        operator(**overrides)
