"""State space duality: recurrence and semiseparable matrix, initial values, padding."""

import torch
from torch.nn import functional as F

from attnlens.attention.ssd import RATES, STEPS, Ssd
from attnlens.testing.inputs import gaussian


def build():
    return Ssd(head_dim=8, num_heads=2, seed=0).double()


def token_by_token(operator, q, k, v):
    """S <- e^{-a t} S + t k v^T, t = softplus(<w, k> + b)."""
    outs, state = [], torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    rate = operator.log_rate.exp()[..., None]
    for i in range(q.shape[2]):
        logit = torch.einsum("bhd,hde->bhe", k[:, :, i], operator.step_size.weight) + operator.step_size.bias[:, 0]
        t = F.softplus(logit)[..., None]
        state = torch.exp(-rate * t) * state + t * k[:, :, i, :, None] * v[:, :, i, None, :]
        outs.append((q[:, :, i, :, None] * state).sum(-2) / q.shape[3] ** 0.5)
    return torch.stack(outs, 2)


def test_equals_its_recurrence_forward_and_backward():
    operator = build()
    for length in (1, 16, 70, 130):
        inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
        learned = [*inputs, *operator.parameters()]
        found, expected = operator(*inputs, causal=True), token_by_token(operator, *inputs)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
        found, expected = (torch.autograd.grad(x.square().sum(), learned) for x in (found, expected))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def test_the_mask_is_semiseparable_of_rank_one():
    """Every block on or below the diagonal of D = P / (s Q K^T diag(t)) has rank one: that is the duality."""
    operator = build()
    q, k, _ = gaussian(24)
    steps = F.softplus(operator.step_size(k).squeeze(-1))
    mask = operator.matrix(q, k, causal=True) / (q @ k.mT / 8**0.5 * steps[..., None, :])
    values = torch.linalg.svdvals(mask[:, :, 12:, :13])
    assert (values[..., 1] <= 1e-12 * values[..., 0]).all()
    assert (mask[:, :, 5, 5] - 1).abs().max() < 1e-12


def test_initial_step_sizes_and_rates_lie_in_the_papers_ranges():
    operator = Ssd(head_dim=8, num_heads=200, seed=1)
    steps, rates = F.softplus(operator.step_size.bias), operator.log_rate.exp()
    assert STEPS[0] * 0.999 <= steps.min() < 2 * STEPS[0]
    assert STEPS[1] / 2 < steps.max() <= STEPS[1] * 1.001
    assert RATES[0] <= rates.min() < 2
    assert 15 < rates.max() <= RATES[1] * 1.001


def test_padding_anywhere_leaves_the_memory_as_it_is():
    q, k, v = gaussian(30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 5:9] = False
    real = mask[0]
    for causal in (False, True):
        padded = build()(q, k, v, causal=causal, key_padding_mask=mask)[:, :, real]
        alone = build()(*(x[:, :, real] for x in (q, k, v)), causal=causal)
        torch.testing.assert_close(padded, alone, atol=1e-12, rtol=1e-12)
