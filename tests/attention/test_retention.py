"""Retention against its recurrence, its decays, and its two directions."""

from itertools import pairwise

import pytest
import torch

from attnlens.attention.retention import Retention
from attnlens.testing.inputs import gaussian


def token_by_token(q, k, v):
    """S <- gamma S + k v^T for each head, gamma = 31/32, 63/64, ..."""
    outs, state = [], torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    gamma = torch.tensor([31 / 32, 63 / 64], dtype=q.dtype)[:, None, None]
    for i in range(q.shape[2]):
        state = gamma * state + k[:, :, i, :, None] * v[:, :, i, None, :]
        outs.append((q[:, :, i, :, None] * state).sum(-2) / q.shape[3] ** 0.5)
    return torch.stack(outs, 2)


@pytest.mark.parametrize("length", [1, 16, 70, 150])
def test_equals_its_recurrence_forward_and_backward(length):
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    found, expected = Retention()(*inputs, causal=True), token_by_token(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-11)
    found, expected = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_weights_are_inner_products_times_a_power_of_the_distance():
    q, k, _ = gaussian(40)
    weights = Retention().matrix(q, k)
    inner = q @ k.mT / 8**0.5
    for head, gamma in enumerate((31 / 32, 63 / 64)):
        for i, j in ((3, 3), (30, 10), (10, 30)):
            expected = inner[:, head, i, j] * gamma ** abs(i - j)
            torch.testing.assert_close(weights[:, head, i, j], expected, atol=1e-13, rtol=1e-12)


def test_padding_anywhere_is_not_counted_in_distances():
    q, k, v = gaussian(30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 5:9] = False
    mask[:, 0] = False
    real = mask[0]
    for causal in (False, True):
        padded = Retention()(q, k, v, causal=causal, key_padding_mask=mask)[:, :, real]
        alone = Retention()(*(x[:, :, real] for x in (q, k, v)), causal=causal)
        torch.testing.assert_close(padded, alone, atol=1e-12, rtol=1e-12)


def test_split_and_resume_in_any_pieces_is_one_causal_run():
    q, k, v = gaussian(100, value_dim=5)
    operator = Retention()
    whole = operator(q, k, v, causal=True)
    for cuts in ([0, 100], [0, 1, 64, 65, 100], list(range(101))):
        state, outs = operator.init_state(2, 2, 8, 5, q), []
        for a, b in pairwise(cuts):
            state, out = operator.step(state, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-12, rtol=1e-12)
    assert sum(x[0, 0].numel() for x in state) == 8 * 5


def test_one_query_over_the_keys_so_far_is_the_last_causal_row():
    q, k, v = gaussian(30)
    whole = Retention()(q, k, v, causal=True)
    torch.testing.assert_close(Retention()(q[:, :, -1:], k, v), whole[:, :, -1:], atol=1e-12, rtol=1e-12)
