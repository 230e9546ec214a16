"""Routing attention against KmeansAttention of routing-transformer, where clusters have as many tokens as it takes.

There each centroid takes the w nearest queries and keys, here each token its nearest centroid: with w tokens in every
cluster these are the same sets. A query and its own key are in one cluster, since the operator always adds the latter.
"""

import pytest
import torch
from torch.nn import functional as F

from attnlens.attention.routing import Routing
from attnlens.testing.inputs import HEAD_DIM, gaussian
from tests.oracles.feed import EXACT, HEADS, assert_agree, leaves, optional, real_tokens


def kmeans_attention(q, k, v, centroids, window, causal, mask):
    module = optional("routing_transformer.routing_transformer")
    num_clusters = centroids.shape[1]
    layer = module.KmeansAttention(num_clusters, window, HEADS, HEAD_DIM, causal=causal).double().eval()
    layer.kmeans.means.copy_(F.normalize(centroids, dim=-1))
    layer.kmeans.initted.fill_(True)
    # Causal, it has a random key that every query sees.
    layer.num_mem_kv = 0
    layer.mem_key = layer.mem_value = torch.nn.Parameter(torch.zeros(HEADS, num_clusters, 0, HEAD_DIM))
    out = layer(q, k, v, query_mask=mask)[0]
    # It divides the sum over the clusters that took a token, here one, by their number plus 1e-5.
    return out * (1 + 1e-5)


def clustered(num_clusters, window, logit_scale):
    """q, k, v in shuffled clusters of `window` tokens, around centroids of zero mean and equal length."""
    generator = torch.Generator().manual_seed(6)
    centroids = F.layer_norm(torch.randn(HEADS, HEAD_DIM, HEAD_DIM, generator=generator).double(), (HEAD_DIM,))
    centroids = torch.cat([centroids[:, :1], -centroids[:, :1], centroids[:, 1:]], 1)[:, :num_clusters]
    n = num_clusters * window
    cluster = torch.rand(2, HEADS, n, generator=generator).argsort(-1) // window
    around = centroids.expand(2, -1, -1, -1).take_along_dim(cluster[..., None], 2)
    q, k, v = gaussian(n)
    q, k = ((around + 0.1 * x) * logit_scale**0.5 for x in (q, k))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), centroids, cluster


def operator(chunk_size, centroids):
    made = Routing(chunk_size, centroids.shape[1], HEAD_DIM, HEADS, seed=0).double()
    made.centroids = centroids
    return made


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, real_tokens(21, 21, 8), real_tokens(21, 13, 20, left=True)])
def test_one_cluster_is_softmax_attention_in_both(mask, causal):
    inputs = leaves(21)
    centroids = torch.ones(HEADS, 1, HEAD_DIM, dtype=torch.float64)
    expected = kmeans_attention(*inputs, centroids, 21, causal, mask)
    found = operator(21, centroids)(*inputs, causal=causal, key_padding_mask=mask)
    assert_agree(found, expected, EXACT, inputs=inputs, mask=mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("logit_scale", [0.3, 3.0])
@pytest.mark.parametrize(("num_clusters", "window"), [(2, 9), (4, 5), (3, 7)])
def test_full_clusters_are_those_of_routing_transformer(num_clusters, window, logit_scale, padded, causal):
    q, k, v, centroids, cluster = clustered(num_clusters, window, logit_scale)
    n = num_clusters * window
    mask = real_tokens(n, n, n // 2) if padded else None
    expected = kmeans_attention(q, k, v, centroids, window, causal, mask)
    # Causal, two chunks that hold a cluster are as good as one: the latest key seen is in the last of those that count.
    for chunk_size in (window, window // 2 + 1) if causal else (window,):
        made = operator(chunk_size, centroids)
        assert all(torch.equal(x, cluster) for x in made.clusters(q, k, None))
        found = made(q, k, v, causal=causal, key_padding_mask=mask)
        assert_agree(found, expected, EXACT, inputs=(q, k, v), mask=mask)
