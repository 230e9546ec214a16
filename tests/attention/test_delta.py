"""The delta rule against its recurrence, as a memory that is overwritten, and with padding."""

import pytest
import torch

from attnlens.attention.delta import Delta
from attnlens.testing.inputs import gaussian


def build(num_heads=2, head_dim=8):
    return Delta(head_dim=head_dim, num_heads=num_heads, seed=0).double()


def token_by_token(operator, q, k, v):
    """S <- S + beta k (v - S^T k)^T with k / |k|, beta = sigmoid(<w, k> + b) of k itself."""
    outs, state = [], torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    for i in range(q.shape[2]):
        logit = torch.einsum("bhd,hde->bhe", k[:, :, i], operator.step_size.weight) + operator.step_size.bias[:, 0]
        key = k[:, :, i] / k[:, :, i].norm(dim=-1, keepdim=True)
        held = torch.einsum("bhd,bhde->bhe", key, state)
        state = state + key[..., None] * (logit.sigmoid() * (v[:, :, i] - held))[..., None, :]
        query = q[:, :, i] / q[:, :, i].norm(dim=-1, keepdim=True)
        outs.append(torch.einsum("bhd,bhde->bhe", query, state))
    return torch.stack(outs, 2), state


@pytest.mark.parametrize("length", [1, 16, 70, 130])
def test_equals_its_recurrence_forward_and_backward(length):
    operator = build()
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    learned = [*inputs, *operator.parameters()]
    found, (expected, _) = operator(*inputs, causal=True), token_by_token(operator, *inputs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    found, expected = (torch.autograd.grad(x.square().sum(), learned) for x in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def test_both_directions_read_the_last_state():
    operator = build()
    q, k, v = gaussian(40, value_dim=5)
    state = token_by_token(operator, q, k, v)[1]
    exact = q / q.norm(dim=-1, keepdim=True) @ state
    torch.testing.assert_close(operator(q, k, v), exact, atol=1e-12, rtol=1e-11)


def test_a_key_that_comes_again_replaces_its_value():
    """With orthonormal keys and full steps a query gets the latest value of its key, and no trace of the one before;
    linear attention would return their sum."""
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    order = torch.tensor([0, 1, 2, 3, 1, 0, 4, 2, 1])
    k = keys[order][None, None]
    v = torch.randn(1, 1, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    operator = build(num_heads=1)
    with torch.no_grad():
        operator.step_size.weight.zero_()
        operator.step_size.bias.fill_(1e3)
    out = operator(keys[:5][None, None], k, v)
    latest = [max(i for i in range(9) if order[i] == key) for key in range(5)]
    torch.testing.assert_close(out[0, 0], v[0, 0, latest], atol=1e-12, rtol=1e-12)


def test_padding_anywhere_leaves_the_memory_as_it_is():
    q, k, v = gaussian(30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 5:9] = False
    mask[:, 25:] = False
    real = mask[0]
    for causal in (False, True):
        padded = build()(q, k, v, causal=causal, key_padding_mask=mask)[:, :, real]
        alone = build()(*(x[:, :, real] for x in (q, k, v)), causal=causal)
        torch.testing.assert_close(padded, alone, atol=1e-12, rtol=1e-12)


def test_long_inputs_in_float32_stay_at_round_off():
    """Two thousand corrections: products of contractions do not amplify what is rounded on the way."""
    operator = Delta(head_dim=8, num_heads=2, seed=0)
    q, k, v = gaussian(2000, batch=1, dtype=torch.float32)
    exact = operator.double().reference(q, k, v, causal=True)
    error = (operator.float()(q, k, v, causal=True) - exact).norm() / exact.norm()
    assert error < 2e-6
