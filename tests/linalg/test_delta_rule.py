"""The delta rule by chunks against one linear system, its contraction, and its reading in both directions."""

import pytest
import torch

from attnlens.linalg.delta_rule import delta_dense, delta_rule, unit
from attnlens.linalg.scan import chunked_scan


def draw(length, decay=True):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 3, length, w, generator=generator, dtype=torch.float64) for w in (4, 4, 5))
    beta, g = (torch.randn(2, 3, length, generator=generator, dtype=torch.float64) for _ in range(2))
    return [
        None if x is None else x.detach().requires_grad_()
        for x in (q, k, v, beta.sigmoid(), -g.abs() / 4 if decay else None)
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("length", [1, 17, 70])
def test_chunks_equal_one_linear_system_forward_and_backward(length, decay, causal):
    inputs = draw(length, decay)
    given = [x for x in inputs if x is not None]
    q, k, *rest = inputs
    found, expected = delta_rule(*inputs, causal=causal), delta_dense(unit(q), unit(k), *rest, causal=causal)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-11)
    found, expected = (torch.autograd.grad(x.square().sum(), given) for x in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


def test_one_query_over_the_keys_so_far_is_the_last_causal_row():
    q, k, v, beta, log_decay = draw(30)
    whole = delta_rule(q, k, v, beta, log_decay, causal=True)
    last = delta_rule(q[:, :, -1:], k, v, beta, log_decay, causal=False)
    torch.testing.assert_close(last, whole[:, :, -1:], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("length", [5, 200])
def test_the_memory_is_bounded_by_what_was_written(length):
    """|S_n| <= sum beta |v|, since every step multiplies by a contraction; without the correction it would not be."""
    _, k, v, _, _ = draw(length, False)
    k = unit(k)
    for beta in (torch.ones(2, 3, length, dtype=torch.float64), torch.rand(2, 3, length, dtype=torch.float64)):
        memory = chunked_scan(k, k, v, beta=beta, final_state=True)[0]
        size = torch.linalg.matrix_norm(memory, 2)
        assert (size <= (beta[..., None] * v).norm(dim=-1).sum(-1) + 1e-12).all()
    repeated = k[:, :, :1].expand_as(k)
    held = chunked_scan(repeated, repeated, v, beta=torch.ones(2, 3, length, dtype=torch.float64))[1]
    torch.testing.assert_close(held, v, atol=1e-12, rtol=1e-12)


def test_a_zero_vector_stays_zero_with_a_finite_gradient():
    x = torch.zeros(1, 2, 2, 3, requires_grad=True)
    unit(x).sum().backward()
    assert (unit(x) == 0).all()
    assert x.grad.isfinite().all()
