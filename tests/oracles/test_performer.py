"""FAVOR+ against the arithmetic of performer-pytorch, given the same projections and without its epsilon."""

import pytest
import torch

from attnlens.attention.performer import Performer
from attnlens.attention.softmax import softmax_naive
from attnlens.testing.inputs import HEAD_DIM, gaussian
from tests.oracles.feed import EXACT, HEADS, assert_agree, leaves, optional, real_tokens

PUBLISHED = 1e-4


def performer_attention(q, k, v, projections, causal, eps):
    """Every head by itself: the package shares one draw."""
    module = optional("performer_pytorch.performer_pytorch")
    heads = []
    for head, matrix in enumerate(projections):
        x, y, values = (part[:, head : head + 1] for part in (q, k, v))
        x = module.softmax_kernel(x, projection_matrix=matrix, is_query=True, eps=eps)
        y = module.softmax_kernel(y, projection_matrix=matrix, is_query=False, eps=eps)
        if causal:
            heads.append(module.causal_linear_attention_noncuda(x, y, values, chunk_size=16, eps=0.0))
        else:
            heads.append(module.linear_attention(x, y, values))
    return torch.cat(heads, 1)


def operator(num_features, head_dim=HEAD_DIM):
    return Performer(num_features, head_dim, HEADS, seed=0).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("logit_scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("length", "num_features"), [(1, 8), (21, 1), (21, 13), (50, 64)])
def test_is_that_of_the_package_without_epsilon(length, num_features, logit_scale, causal):
    inputs = leaves(length, logit_scale)
    ours = operator(num_features)
    expected = performer_attention(*inputs, ours.projections, causal, 0.0)
    assert_agree(ours(*inputs, causal=causal), expected, EXACT, inputs=inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_padded_examples_are_those_of_the_package_without_their_padding(left, causal):
    q, k, v = gaussian(33)
    mask = real_tokens(33, 33, 12, left=left)
    ours = operator(16)
    found = ours(q, k, v, causal=causal, key_padding_mask=mask)
    for example in range(2):
        alone = [x[example, :, mask[example]][None] for x in (q, k, v)]
        expected = performer_attention(*alone, ours.projections, causal, 0.0)
        assert_agree(found[example, :, mask[example]][None], expected, EXACT)


@pytest.mark.parametrize("logit_scale", [1.0, 3.0])
def test_with_the_published_epsilon_it_says_no_more_than_the_mean_of_the_values(logit_scale):
    """The documented departure: at d = 64 the 1e-4 that it adds to every feature outweighs the feature.

    At logit scale 1 the output is no closer to softmax attention than mean(V) is; at 3 it is mean(V).
    """
    q, k, v = gaussian(256, head_dim=64, logit_scale=logit_scale)
    ours = operator(256, 64)
    swamped, clean = (performer_attention(q, k, v, ours.projections, False, eps) for eps in (PUBLISHED, 0.0))
    mean, exact = v.mean(2, keepdim=True), softmax_naive(q, k, v)
    assert (swamped - exact).norm() > 0.99 * (mean - exact).norm()
    assert logit_scale == 1 or (swamped - mean).norm() < 1e-3 * (exact - mean).norm()
    assert_agree(ours(q, k, v), clean, EXACT)


def test_the_published_maximum_lets_the_future_into_the_past():
    """The documented departure: with the epsilon, one maximum over all keys makes the past depend on later ones."""
    q, k, v = gaussian(33)
    ours = operator(16)
    later = k.clone()
    later[:, :, 20:] = 4 * k[:, :, 20:]
    theirs, ours = (
        [run(q, keys, v)[:, :, :20] for keys in (k, later)]
        for run in (
            lambda *x: performer_attention(*x, ours.projections, True, PUBLISHED),
            lambda *x: ours(*x, causal=True),
        )
    )
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3
    assert torch.equal(ours[0], ours[1])
