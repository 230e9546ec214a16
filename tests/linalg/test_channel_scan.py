"""The scan with a decay of every channel against single tokens, and where its factors would overflow."""

import pytest
import torch

from attnlens.linalg.channel_scan import channel_scan, decayed_scores
from attnlens.linalg.decay import bounded_decay


def draw(length, strength=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 3, length, 4)] * 3 + [(2, 3, length, 5), (2, 3, 4, 5)]
    q, k, g, v, state = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, -strength * g.abs(), state)]


def token_by_token(q, k, v, log_decay, state):
    outs = []
    for i in range(q.shape[2]):
        state = log_decay[:, :, i, :, None].exp() * state + k[:, :, i, :, None] * v[:, :, i, None, :]
        outs.append((q[:, :, i, :, None] * state).sum(-2))
    return state, torch.stack(outs, 2)


@pytest.mark.parametrize("chunk", [1, 2, 8, 32, None])
@pytest.mark.parametrize("length", [1, 5, 8, 37])
def test_chunks_equal_single_tokens_forward_and_backward(length, chunk):
    q, k, v, log_decay, state = inputs = draw(length)
    found = channel_scan(q, k, v, log_decay, state=state, final_state=True, chunk=chunk)
    expected = token_by_token(*inputs)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, inputs, cotangents), torch.autograd.grad(expected, inputs, cotangents), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_scores_by_halves_are_the_sum_over_channels():
    q, k, _, log_decay, _ = draw(16)
    total = log_decay.cumsum(-2)
    exact = (q[..., :, None, :] * k[..., None, :, :] * (total[..., :, None, :] - total[..., None, :, :]).exp()).sum(-1)
    torch.testing.assert_close(decayed_scores(q, k, total), exact.tril(), atol=1e-12, rtol=1e-12)


def test_decays_whose_factors_overflow_do_no_harm():
    """(q e^L) (k e^{-L}) is 0 * inf from a sum of -89 on in float32, which gates near zero reach within a token."""
    q, k, v, log_decay, state = draw(64, 60.0, torch.float32)
    total = log_decay.cumsum(-2)
    assert not ((q * total.exp()) @ (k * (-total).exp()).mT).isfinite().all()
    log_decay = bounded_decay(log_decay)
    out = channel_scan(q, k, v, log_decay, state=state)[1]
    exact = token_by_token(*(x.double() for x in (q, k, v, log_decay, state)))[1]
    torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=1e-4)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, log_decay, state)))
