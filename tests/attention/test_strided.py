"""Strided and fixed patterns: the explicit mask as oracle, forward and backward, pairs visited once, and the bound."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import measure_flops
from attnlens.attention import build, strided
from attnlens.attention.softmax import softmax_naive
from attnlens.attention.strided import Strided
from attnlens.attention.window import Window
from attnlens.testing.inputs import EXACT, gaussian


def pattern(n, window, stride, num_summary, causal):
    """The claimed mask, pair by pair."""

    def visible(i, j):
        if num_summary is None:
            return abs(i - j) < window or (i - j) % stride == 0
        return i // window == j // window or j % stride >= stride - num_summary

    mask = torch.tensor([[visible(i, j) for j in range(n)] for i in range(n)])
    return mask.tril() if causal else mask


def masked_attention(q, k, v, visible):
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores.masked_fill(~visible.any(-1, keepdim=True), 0), -1)
    return weights.masked_fill(~visible, 0) @ v


STRIDED = [(1, 1, 1), (2, 1, 5), (5, 2, 2), (16, 4, 4), (17, 4, 4), (17, 1, 4), (17, 5, 3), (17, 3, 5), (18, 16, 4)]
STRIDED += [(17, 6, 3), (17, 4, 40), (17, 17, 4), (17, 3, 1)]
CASES = [(*case, None) for case in STRIDED]
CASES += [(1, 1, 1, 1), (16, 4, 4, 1), (17, 4, 4, 2), (18, 5, 3, 1), (19, 3, 5, 4), (17, 4, 4, 4), (7, 2, 40, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window", "stride", "num_summary"), CASES)
def test_equals_dense_attention_under_its_mask(length, window, stride, num_summary, causal):
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found = Strided(window, stride, num_summary)(*inputs, causal=causal)
    expected = masked_attention(*inputs, pattern(length, window, stride, num_summary, causal))
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_summary", [None, 1])
def test_padding_anywhere_is_skipped(num_summary, causal):
    q, k, v = gaussian(13)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, [0, 4, 5, 6, 7, 8]] = False
    mask[1, 9:] = False
    expected = masked_attention(q, k, v, pattern(13, 2, 4, num_summary, causal) & mask[:, None, None])
    found = Strided(2, 4, num_summary)(q, k, v, causal=causal, key_padding_mask=mask)
    shown = mask[:, None, :, None].expand_as(found)
    assert torch.allclose(found[shown], expected[shown], atol=EXACT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_summary", [None, 2])
def test_every_pair_of_the_pattern_is_visited_once(num_summary, causal):
    """A key on the grid and inside the window is in both sets: visited twice it would count twice."""
    op = Strided(8, 6, num_summary)
    count = measure_flops(lambda q, k, v: op(q, k, v, causal=causal), *(x[:1] for x in gaussian(96)))
    assert count.unknown == ()
    assert count.visited == 2 * int(pattern(96, 8, 6, num_summary, causal).sum())


@pytest.mark.parametrize("causal", [False, True])
def test_summaries_in_chunks_of_rows_equal_one_run(causal, monkeypatch):
    q, k, v = gaussian(40)
    whole = Strided(4, 6, 2)(q, k, v, causal=causal)
    monkeypatch.setattr(strided, "ROWS", 7)
    assert torch.allclose(Strided(4, 6, 2)(q, k, v, causal=causal), whole, atol=EXACT)


@pytest.mark.parametrize("num_summary", [None, 1])
def test_two_layers_reach_every_earlier_token(num_summary):
    """The paper's reason for the patterns: with w = l any token reaches any later one in two steps, a window not."""
    q, k, _ = gaussian(64)
    weights = Strided(8, 8, num_summary).matrix(q, k, causal=True)
    earlier = torch.ones(64, 64, dtype=torch.bool).tril()
    assert torch.equal(weights @ weights > 0, earlier.expand_as(weights))
    weights = Window(8).matrix(q, k, causal=True)
    assert not torch.equal(weights @ weights > 0, earlier.expand_as(weights))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_summary", [None, 2])
def test_bound_holds_under_padding_and_is_attained_by_opposite_values(num_summary, causal):
    q, k, v = gaussian(20, logit_scale=2.0)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    op = Strided(3, 5, num_summary)
    bound = op.error_bound(q, k, v, causal=causal, key_padding_mask=mask)
    error = op(q, k, v, causal=causal, key_padding_mask=mask) - softmax_naive(
        q, k, v, causal=causal, key_padding_mask=mask
    )
    assert (error.norm(dim=-1) <= bound)[mask[:, None].expand_as(bound)].all()
    sign = 2 * pattern(20, 3, 5, num_summary, causal)[19].double() - 1
    v = sign[None, None, :, None] * torch.ones_like(v)
    error = (op(q, k, v, causal=causal) - softmax_naive(q, k, v, causal=causal)).norm(dim=-1)
    assert torch.allclose(error[..., 19], op.error_bound(q, k, v, causal=causal)[..., 19], rtol=1e-6)


def test_bad_arguments_are_refused_and_the_config_builds():
    for window, stride, argument in ((0, 1, "window"), (1, 0, "stride")):
        with pytest.raises(ValueError, match=f"`{argument}` must be at least 1, got 0"):
            Strided(window, stride)
    for num_summary in (0, 4):
        with pytest.raises(ValueError, match=r"`num_summary` must be in 1..`stride`=3 or None"):
            Strided(2, 3, num_summary)
    config = OmegaConf.load("conf/attention/strided.yaml")
    assert build(config, head_dim=8, num_heads=2, max_length=128, seed=0, window=3).window == 3
