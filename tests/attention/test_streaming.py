"""Sinks and window: the explicit mask as oracle, forward and backward, pairs visited once, and the bound."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import measure_flops
from attnlens.attention import build
from attnlens.attention.softmax import softmax_naive
from attnlens.attention.streaming import Streaming
from attnlens.attention.window import Window
from attnlens.testing.inputs import EXACT, gaussian


def pattern(n, sinks, window, causal):
    """The claimed mask, pair by pair."""
    rows = [[j < sinks or (i - j if causal else abs(i - j)) < window for j in range(n)] for i in range(n)]
    return torch.tensor(rows).tril() if causal else torch.tensor(rows)


def masked_attention(q, k, v, visible):
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores.masked_fill(~visible.any(-1, keepdim=True), 0), -1)
    return weights.masked_fill(~visible, 0) @ v


CASES = [(1, 4, 1), (2, 1, 1), (5, 1, 2), (12, 4, 4), (13, 3, 4), (13, 0, 4), (13, 12, 1), (13, 2, 13), (13, 9, 4)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "sinks", "window"), CASES)
def test_equals_dense_attention_under_its_mask(length, sinks, window, causal):
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found = Streaming(window, sinks)(*inputs, causal=causal)
    expected = masked_attention(*inputs, pattern(length, sinks, window, causal))
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_anywhere_is_skipped(causal):
    q, k, v = gaussian(13)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, [0, 4, 5, 6, 7, 8]] = False
    mask[1, 9:] = False
    expected = masked_attention(q, k, v, pattern(13, 2, 3, causal) & mask[:, None, None])
    found = Streaming(3, 2)(q, k, v, causal=causal, key_padding_mask=mask)
    shown = mask[:, None, :, None].expand_as(found)
    assert torch.allclose(found[shown], expected[shown], atol=EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_every_pair_of_the_pattern_is_visited_once(causal):
    """A sink inside the window is in both sets: visited twice it would count twice."""
    inputs = [x[:1] for x in gaussian(96)]
    count = measure_flops(lambda q, k, v: Streaming(8, 4)(q, k, v, causal=causal), *inputs)
    assert count.unknown == ()
    pairs = int(pattern(96, 4, 8, causal).sum()) * 2
    # Only the rows that fill up the last block are visited beside the pattern: fewer than a block of them.
    assert pairs <= count.visited <= pairs + 2 * 8 * 16


@pytest.mark.parametrize("causal", [False, True])
def test_bound_holds_under_padding_and_is_attained_by_opposite_values(causal):
    q, k, v = gaussian(20, logit_scale=2.0)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    op = Streaming(4, 2)
    bound = op.error_bound(q, k, v, causal=causal, key_padding_mask=mask)
    error = op(q, k, v, causal=causal, key_padding_mask=mask) - softmax_naive(
        q, k, v, causal=causal, key_padding_mask=mask
    )
    assert (error.norm(dim=-1) <= bound)[mask[:, None].expand_as(bound)].all()
    sign = 2 * pattern(20, 2, 4, causal)[19].double() - 1
    v = sign[None, None, :, None] * torch.ones_like(v)
    error = (op(q, k, v, causal=causal) - softmax_naive(q, k, v, causal=causal)).norm(dim=-1)
    assert torch.allclose(error[..., 19], op.error_bound(q, k, v, causal=causal)[..., 19], rtol=1e-6)


def test_sinks_hold_what_a_window_loses_when_a_first_key_draws_the_mass():
    """The paper's finding in small: with a sink at key 0 the plain window fails and the sinks mend it."""
    q, k, v = gaussian(128)
    q = q + 2
    k[:, :, 0] = 2
    exact = softmax_naive(q, k, v, causal=True)
    errors = [(op(q, k, v, causal=True) - exact).norm() / exact.norm() for op in (Window(16), Streaming(12, 4))]
    assert errors[1] < 0.2 * errors[0]


def test_bad_arguments_are_refused_and_the_config_builds():
    with pytest.raises(ValueError, match="`window` must be at least 1"):
        Streaming(0)
    with pytest.raises(ValueError, match="`num_sinks` must be at least 0, got -1"):
        Streaming(3, -1)
    config = OmegaConf.load("conf/attention/streaming.yaml")
    assert build(config, head_dim=8, num_heads=2, max_length=128, seed=0, window=3).window == 3
