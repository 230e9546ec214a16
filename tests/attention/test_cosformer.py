"""cosFormer against its definition, its constant M, and as a recurrence."""

import math
from itertools import pairwise

import pytest
import torch

from attnlens.attention.cosformer import Cosformer, cosformer_naive, cosine_features
from attnlens.testing.inputs import gaussian


def loop(q, k, v, max_length, causal):
    """Pair by pair, without features."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for i in range(q.shape[2]):
        keys = range(i + 1) if causal else range(k.shape[2])
        cosine = torch.tensor([math.cos(math.pi * (i - j) / (2 * max_length)) for j in keys], dtype=q.dtype)
        w = (q[:, :, i, None].clamp_min(0) * k[:, :, : len(keys)].clamp_min(0)).sum(-1) * cosine
        total = w.sum(-1, keepdim=True)
        out[:, :, i] = (w[..., None] * v[:, :, : len(keys)]).sum(-2) / torch.where(total == 0, 1, total)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_equals_pairs_one_by_one_forward_and_backward(length, causal):
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    found, expected = Cosformer(100)(*inputs, causal=causal), loop(*inputs, 100, causal)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-11)
    found, expected = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


def test_outputs_of_a_prefix_do_not_depend_on_the_length():
    """With the current length for M, as published, the same first tokens get other weights in a longer input."""
    q, k, v = gaussian(100)
    whole = Cosformer(128)(q, k, v, causal=True)[:, :, :40]
    first = [x[:, :, :40] for x in (q, k, v)]
    torch.testing.assert_close(Cosformer(128)(*first, causal=True), whole, atol=1e-12, rtol=1e-12)
    assert (cosformer_naive(*first, 40, causal=True) - cosformer_naive(*first, 100, causal=True)).abs().max() > 1e-2


def test_no_feature_is_negative_and_rows_sum_to_one_where_anything_is_seen():
    """Row sums without cancellation, in float32, up to the last position, where cosines reach 0.01."""
    q, k, _ = gaussian(128, dtype=torch.float32)
    assert cosine_features(q, torch.arange(128)[None], 128).min() >= 0
    weights = Cosformer(128).matrix(q, k, causal=True)
    assert weights.min() >= 0
    sums, seen = weights.sum(-1), (q.relu() @ k.relu().mT).tril().sum(-1) > 0
    assert (sums[seen] - 1).abs().max() < 1e-5
    assert (sums[~seen] == 0).all()
    assert (~seen).any(), "the case of a query without a key did not come up"


def test_split_and_resume_in_any_pieces_is_one_causal_run():
    q, k, v = gaussian(100, value_dim=5)
    operator = Cosformer(100)
    whole = operator(q, k, v, causal=True)
    for cuts in ([0, 100], [0, 1, 64, 65, 100], list(range(101))):
        state, outs = operator.init_state(2, 2, 8, 5, q), []
        for a, b in pairwise(cuts):
            state, out = operator.step(state, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-12, rtol=1e-12)
    assert state.moment[0, 0].numel() + state.mass[0, 0].numel() == 2 * 8 * (5 + 1)
    with pytest.raises(ValueError, match="`max_length`=100"):
        operator.step(state, q[:, :, :1], k[:, :, :1], v[:, :, :1])


def test_padding_anywhere_takes_no_position():
    q, k, v = gaussian(30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 5:9] = False
    mask[:, 0] = False
    real = mask[0]
    for causal in (False, True):
        padded = Cosformer(64)(q, k, v, causal=causal, key_padding_mask=mask)[:, :, real]
        alone = Cosformer(64)(*(x[:, :, real] for x in (q, k, v)), causal=causal)
        torch.testing.assert_close(padded, alone, atol=1e-12, rtol=1e-12)


def test_lengths_that_have_no_position_are_refused():
    q, k, v = gaussian(30)
    with pytest.raises(ValueError, match="`max_length`=20"):
        Cosformer(20)(q, k, v)
    with pytest.raises(ValueError, match="the last of them"):
        Cosformer(64)(q, k[:, :, :10], v[:, :, :10])
    with pytest.raises(ValueError, match="at least 1"):
        Cosformer(0)
    last = Cosformer(64)(q[:, :, -1:], k, v)
    torch.testing.assert_close(last, Cosformer(64)(q, k, v, causal=True)[:, :, -1:], atol=1e-12, rtol=1e-12)
