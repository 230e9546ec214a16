"""Chunked causal kernel products against the masked matrix, forward and backward."""

import pytest
import torch

from attnlens.linalg.prefix import causal_kernel_attention, kernel_attention, normalized


def features(length, width=6, value_dim=5):
    generator = torch.Generator().manual_seed(length)
    f_q, f_k = (torch.rand(2, 3, length, width, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 3, length, value_dim, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in (f_q, f_k, v)]


def dense(f_q, f_k, v):
    weights = (f_q @ f_k.mT).tril()
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 64, 65])
def test_chunks_equal_the_masked_matrix_forward_and_backward(length):
    inputs = features(length)
    out = causal_kernel_attention(*inputs, chunk=8)[1]
    exact = dense(*inputs)
    torch.testing.assert_close(out, exact, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad((out * cotangent).sum(), inputs)
    expected = torch.autograd.grad((exact * cotangent).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_the_final_state_holds_the_whole_sums():
    f_q, f_k, v = features(21)
    state, _ = causal_kernel_attention(f_q, f_k, v, final_state=True, chunk=8)
    torch.testing.assert_close(state.moment, f_k.mT @ v, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state.mass, f_k.sum(-2), atol=1e-12, rtol=1e-12)


def test_the_last_causal_row_is_the_bidirectional_one():
    f_q, f_k, v = features(30)
    last = causal_kernel_attention(f_q, f_k, v, chunk=8)[1][:, :, -1:]
    torch.testing.assert_close(last, kernel_attention(f_q[:, :, -1:], f_k, v), atol=1e-12, rtol=1e-12)


def test_a_query_that_saw_nothing_gives_zero_with_a_finite_gradient():
    numerator = torch.zeros(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    normalizer = torch.tensor([[[0.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    out = normalized(numerator, normalizer)
    out.sum().backward()
    assert (out == 0).all()
    assert normalizer.grad.isfinite().all()
    assert numerator.grad[0, 0, 1, 0] == 0.5


def test_a_small_normalizer_has_a_finite_gradient():
    """Matching a Performer to a trained layer stopped at its first step: at a mass of e^-46, well inside the range of
    float32, the gradient of 1 / mass was e^92, which is not."""
    mass = torch.tensor([2.0**-66, 2.0**-100], requires_grad=True)
    moment = (torch.tensor([[1.0], [3.0]]) * mass.detach()[:, None]).requires_grad_()
    out = normalized(moment, mass)
    torch.testing.assert_close(out, torch.tensor([[1.0], [3.0]]))
    found = torch.autograd.grad(out.sum(), (moment, mass))
    torch.testing.assert_close(found[0], 1 / mass.detach()[:, None])
    torch.testing.assert_close(found[1], -torch.tensor([1.0, 3.0]) / mass.detach())
