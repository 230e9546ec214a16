"""Gated linear attention against its recurrence, the limits of its gate, and padding."""

import pytest
import torch

from attnlens.attention.gla import Gla
from attnlens.testing.inputs import gaussian


def build(**overrides):
    return Gla(head_dim=8, num_heads=2, seed=0, **overrides).double()


def token_by_token(operator, q, k, v):
    """S <- diag(a) S + k v^T, a = sigmoid(W k + b)^(1/tau)."""
    outs, state = [], torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    for i in range(q.shape[2]):
        logits = torch.einsum("bhd,hde->bhe", k[:, :, i], operator.gate.weight) + operator.gate.bias[:, 0]
        state = torch.sigmoid(logits)[..., None] ** (1 / operator.temperature) * state
        state = state + k[:, :, i, :, None] * v[:, :, i, None, :]
        outs.append((q[:, :, i, :, None] * state).sum(-2) / q.shape[3] ** 0.5)
    return torch.stack(outs, 2)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 16.0])
@pytest.mark.parametrize("length", [2, 16, 70])
def test_equals_its_recurrence_forward_and_backward(length, temperature):
    """At tau = 0.1 decays reach e^-60 a token, whose inverse no chunk may form."""
    operator = build(temperature=temperature)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    learned = [*inputs, *operator.parameters()]
    found, expected = operator(*inputs, causal=True), token_by_token(operator, *inputs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    found, expected = (torch.autograd.grad(x.square().sum(), learned) for x in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def test_the_initial_gates_are_those_of_the_docstring():
    operator = build()
    half_life = 0.5 ** (1 / 16)
    assert torch.sigmoid(operator.gate.bias).pow(1 / 16).sub(half_life).abs().max() < 1e-12
    assert not torch.equal(operator.gate.weight[0], operator.gate.weight[1])


def test_open_gates_give_plain_linear_attention_and_closed_gates_the_own_token():
    q, k, v = gaussian(40)
    scores = q @ k.mT / 8**0.5
    for bias, mask in ((1e4, torch.ones(40, 40).tril()), (-1e6, torch.eye(40))):
        operator = build()
        with torch.no_grad():
            operator.gate.weight.zero_()
            operator.gate.bias.fill_(bias)
        exact = (scores * mask) @ v
        torch.testing.assert_close(operator(q, k, v, causal=True), exact, atol=1e-11, rtol=1e-11)


def test_padding_anywhere_leaves_the_memory_as_it_is():
    q, k, v = gaussian(30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 5:9] = False
    real = mask[0]
    for causal in (False, True):
        padded = build()(q, k, v, causal=causal, key_padding_mask=mask)[:, :, real]
        alone = build()(*(x[:, :, real] for x in (q, k, v)), causal=causal)
        torch.testing.assert_close(padded, alone, atol=1e-12, rtol=1e-12)


def test_other_heads_and_temperatures_are_refused():
    with pytest.raises(ValueError, match="`temperature`"):
        build(temperature=0.0)
    with pytest.raises(ValueError, match="`num_heads` and `head_dim`"):
        build()(*gaussian(5, head_dim=4))
