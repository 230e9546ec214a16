"""The gated delta rule against its recurrence, its limit without decay, and padding."""

import pytest
import torch

from attnlens.attention.delta import Delta
from attnlens.attention.gated_delta import GatedDelta
from attnlens.testing.inputs import gaussian


def build(**overrides):
    return GatedDelta(head_dim=8, num_heads=2, seed=0, **overrides).double()


def token_by_token(operator, q, k, v):
    """S <- a (I - beta k k^T) S + beta k v^T with k / |k|; the gates read k itself."""
    outs, state = [], torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    eye = torch.eye(k.shape[3], dtype=q.dtype)
    for i in range(q.shape[2]):
        beta, decay = (
            (torch.einsum("bhd,hde->bhe", k[:, :, i], gate.weight) + gate.bias[:, 0]).sigmoid()[..., None]
            for gate in (operator.step_size, operator.decay)
        )
        key = (k[:, :, i] / k[:, :, i].norm(dim=-1, keepdim=True))[..., None]
        state = decay * (eye - beta * key @ key.mT) @ state + beta * key @ v[:, :, i, None, :]
        query = q[:, :, i] / q[:, :, i].norm(dim=-1, keepdim=True)
        outs.append((query[..., None, :] @ state).squeeze(-2))
    return torch.stack(outs, 2)


@pytest.mark.parametrize("decay_bias", [-3.0, 4.0])
@pytest.mark.parametrize("length", [1, 16, 70, 130])
def test_equals_its_recurrence_forward_and_backward(length, decay_bias):
    operator = build(decay_bias=decay_bias)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    learned = [*inputs, *operator.parameters()]
    found, expected = operator(*inputs, causal=True), token_by_token(operator, *inputs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    found, expected = (torch.autograd.grad(x.square().sum(), learned) for x in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def test_without_decay_it_is_the_delta_rule():
    plain, gated = Delta(head_dim=8, num_heads=2, seed=0).double(), build(decay_bias=1e4)
    gated.step_size.load_state_dict(plain.step_size.state_dict())
    q, k, v = gaussian(70)
    for causal in (False, True):
        torch.testing.assert_close(gated(q, k, v, causal=causal), plain(q, k, v, causal=causal), atol=1e-12, rtol=1e-12)


def test_the_initial_decay_keeps_most_of_the_memory():
    assert abs(build().decay.bias.sigmoid().mean().item() - 0.982) < 1e-3
    assert not torch.equal(build().step_size.weight, build().decay.weight)


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
