"""Sliding window: the explicit band as oracle, forward and backward, and the dropped-mass bound."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.softmax import softmax_naive
from attnlens.attention.window import Window
from attnlens.testing.inputs import EXACT, gaussian


def band_attention(q, k, v, window, causal, mask=None):
    """Dense softmax under the band 0 <= i - j < w or |i - j| < w; rows without a key are zero."""
    n = q.shape[2]
    gap = torch.arange(n)[:, None] - torch.arange(n)
    visible = (gap < window) & (gap > -window) & (gap >= (0 if causal else -n))
    visible = visible[None, None] if mask is None else visible & mask[:, None, None]
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores.masked_fill(~visible.any(-1, keepdim=True), 0), -1)
    return weights.masked_fill(~visible, 0) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (2, 1), (5, 2), (12, 4), (13, 4), (13, 12), (13, 13), (9, 40)])
def test_equals_dense_attention_under_the_band(length, window, causal):
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = Window(window)(*inputs, causal=causal), band_attention(*inputs, window, causal)
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_anywhere_is_skipped_and_an_empty_window_gives_zero(causal):
    q, k, v = gaussian(13)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, [0, 4, 5, 6, 7, 8]] = False
    mask[1, 9:] = False
    expected = band_attention(q, k, v, 2, causal, mask)
    assert expected[0, :, 6].eq(0).all()
    found = Window(2)(q, k, v, causal=causal, key_padding_mask=mask)
    shown = mask[:, None, :, None].expand_as(found)
    assert torch.allclose(found[shown], expected[shown], atol=EXACT)
    assert found[0, :, 6].eq(0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_bound_holds_under_padding_and_is_attained_by_opposite_values(scale, causal):
    """Two values only, one inside every window of row 0 and one outside: the error is delta times the diameter."""
    q, k, v = gaussian(20, logit_scale=scale)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    op = Window(4)
    bound = op.error_bound(q, k, v, causal=causal, key_padding_mask=mask)
    exact = softmax_naive(q, k, v, causal=causal, key_padding_mask=mask)
    error = (op(q, k, v, causal=causal, key_padding_mask=mask) - exact).norm(dim=-1)
    assert (error <= bound)[mask[:, None].expand_as(error)].all()
    row = 19 if causal else 0
    sign = 1 - 2 * ((torch.arange(20) - row).abs() < 4).double()
    v = sign[None, None, :, None] * torch.ones_like(v)
    error = (op(q, k, v, causal=causal) - softmax_naive(q, k, v, causal=causal)).norm(dim=-1)
    bound = op.error_bound(q, k, v, causal=causal)
    assert torch.allclose(error[..., row], bound[..., row], rtol=1e-6)


def test_error_falls_to_zero_as_the_window_grows():
    q, k, v = gaussian(64)
    for causal in (False, True):
        exact = softmax_naive(q, k, v, causal=causal)
        errors = [(Window(w)(q, k, v, causal=causal) - exact).norm().item() for w in (8, 16, 32, 48, 64)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < EXACT


def test_bad_window_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="`window` must be at least 1"):
        Window(0)
    q, k, v = gaussian(5)
    with pytest.raises(ValueError, match="as many queries as keys"):
        Window(3)(q[:, :, :1], k, v)


def test_config_builds_with_an_override():
    config = OmegaConf.load("conf/attention/window.yaml")
    assert build(config, head_dim=8, num_heads=2, max_length=128, seed=0, window=3).window == 3
