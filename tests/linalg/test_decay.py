"""Decayed attention in both directions, with masks, and with queries that are the last tokens."""

import pytest
import torch

from attnlens.linalg.channel_scan import channel_scan
from attnlens.linalg.decay import bounded_decay, decayed_dense, in_both_directions, masked_tokens
from attnlens.linalg.scan import chunked_scan


def by_token(q, k, v, log_decay):
    return chunked_scan(q, k, v, log_decay=log_decay)[1]


def by_channel(q, k, v, log_decay):
    return channel_scan(q, k, v, log_decay)[1]


def draw(length, channels):
    generator = torch.Generator().manual_seed(length)
    q, k, v, g = (torch.randn(2, 3, length, w, generator=generator, dtype=torch.float64) for w in (4, 4, 5, 4))
    return [x.requires_grad_() for x in (q, k, v, -(g if channels else g[..., 0]).abs())]


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("length", [2, 17, 40])
def test_two_runs_equal_the_definition_forward_and_backward(length, channels):
    inputs = draw(length, channels)
    scan = by_channel if channels else by_token
    found, expected = in_both_directions(scan, *inputs), decayed_dense(*inputs, causal=False)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    found, expected = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_the_definition_multiplies_the_decays_between_two_positions():
    q, k, _, log_decay = (x.detach() for x in draw(6, True))
    weights = decayed_dense(q, k, torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6), log_decay, causal=False)
    between = log_decay[0, 0, 2:5].sum(0).exp()
    for i, j in ((4, 1), (1, 4)):
        expected = (q[0, 0, i] * k[0, 0, j] * between).sum()
        torch.testing.assert_close(weights[0, 0, i, j], expected, atol=1e-14, rtol=1e-12)


def test_fewer_queries_are_the_last_tokens_and_more_have_no_place():
    q, k, v, log_decay = draw(20, False)
    whole = in_both_directions(by_token, q, k, v, log_decay)
    some = in_both_directions(by_token, q[:, :, -3:], k, v, log_decay)
    torch.testing.assert_close(some, whole[:, :, -3:], atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="the last of them"):
        in_both_directions(by_token, torch.cat([q, q], 2), k, v, log_decay)


def test_masks_and_bounds():
    mask = torch.tensor([[True, False]])
    for x in (torch.full((1, 3, 2), torch.nan), torch.full((1, 3, 2, 4), torch.nan)):
        masked = masked_tokens(x, mask)
        assert (masked[:, :, 1] == 0).all()
        assert masked[:, :, 0].isnan().all()
        assert masked_tokens(x, None) is x
    rates = bounded_decay(torch.tensor([-1e6, -1.0]))
    assert rates[0].exp() > 0
    assert rates[1] == -1
