"""The linear domain against the log domain in float64, and where it ends."""

import pytest
import torch

from attnlens.linalg.feature_scan import linear_chunk, num_in_range


def features(length, *, dtype=torch.float64, scale=1.0, seed=0):
    """Log features of three heads and values."""
    generator = torch.Generator().manual_seed(seed)
    log_x, log_y = scale * torch.randn(2, 3, length, 7, generator=generator, dtype=torch.float64)
    return (
        log_x.to(dtype),
        log_y.to(dtype),
        torch.randn(3, length, 4, generator=generator, dtype=torch.float64).to(dtype),
    )


def naive(log_x, log_y, v, real=None):
    """Pair by pair, in the log domain."""
    weights = torch.logsumexp(log_x[:, :, None] + log_y[:, None], -1)
    hidden = torch.ones(weights.shape[1:], dtype=torch.bool).triu(1)
    if real is not None:
        hidden = hidden | ~real[:, None]
    return torch.softmax(weights.masked_fill(hidden, -torch.inf), -1).nan_to_num(0) @ v


@pytest.mark.parametrize("cuts", [(20,), (7, 13), (1, 1, 18)])
def test_chunks_equal_the_naive_form_forward_and_backward(cuts):
    inputs = [x.requires_grad_() for x in features(20)]
    past, outs = None, []
    for parts in zip(*(x.split(cuts, 1) for x in inputs), strict=True):
        out, past = linear_chunk(*parts, None, past)
        outs.append(out)
    out, expected = torch.cat(outs, 1), naive(*inputs)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads, others = (torch.autograd.grad((y * weights).sum(), inputs) for y in (out, expected))
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-11, rtol=1e-9)


def test_padding_weighs_nothing_and_a_row_of_padding_is_zero():
    log_x, log_y, v = features(12)
    real = torch.ones(3, 12, dtype=torch.bool)
    real[0, :4] = real[1, 5:] = False
    out, _ = linear_chunk(log_x, log_y, v, real, None)
    torch.testing.assert_close(out, naive(log_x, log_y, v, real), atol=1e-12, rtol=1e-12)
    assert (out[0, :4] == 0).all()


def test_within_its_range_float32_keeps_its_digits():
    """Five percent of these tokens are near the end of the range; relative errors stay at the round-off of sums."""
    for seed in range(20):
        log_x, log_y, v = features(64, dtype=torch.float32, scale=8.0, seed=seed)
        held, _ = num_in_range(log_x, log_y, None, None)
        if held > 0:
            out, _ = linear_chunk(log_x[:, :held], log_y[:, :held], v[:, :held], None, None)
            exact = naive(*(x[:, :held].double() for x in (log_x, log_y, v)))
            assert (out - exact).abs().max() <= 1e-5 * v.abs().max()


def test_a_token_counts_by_itself_and_what_came_before():
    log_x, log_y, _ = features(30, dtype=torch.float32)
    assert num_in_range(log_x, log_y, None, None)[0] == 30
    loud = log_y.clone()
    loud[1, 17] += 60
    assert num_in_range(log_x, loud, None, None)[0] == 17
    faint = log_y.clone()
    faint[2, 4] -= 60
    assert num_in_range(log_x, faint, None, None)[0] == 4
    extremes = num_in_range(log_x[:, :10], faint[:, :10], None, None)[1]
    assert num_in_range(log_x[:, 10:], faint[:, 10:], None, extremes)[0] == 0


def test_padding_and_nan_do_not_pass_as_keys():
    log_x, log_y, _ = features(9, dtype=torch.float32)
    real = torch.ones(3, 9, dtype=torch.bool)
    real[:, 2] = False
    log_y[:, 2] = 500
    assert num_in_range(log_x, log_y, real, None)[0] == 9
    log_x[0, 6, 0] = torch.nan
    assert num_in_range(log_x, log_y, real, None)[0] == 6
