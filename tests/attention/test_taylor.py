"""Taylor attention: the true number of features, pairs against features, and its distance from softmax."""

from itertools import pairwise

import pytest
import torch

from attnlens.analysis.flops import measure_flops
from attnlens.attention import taylor
from attnlens.attention.taylor import (
    Taylor,
    num_features,
    polynomial,
    taylor_bidirectional,
    taylor_causal,
    taylor_features,
    taylor_pairs,
)
from attnlens.linalg.dense import softmax_naive
from attnlens.testing.inputs import gaussian


def _scaled(q, k):
    return q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25


@pytest.mark.parametrize("dim", [1, 2, 5, 16])
def test_features_are_as_many_as_said_and_their_inner_product_is_the_polynomial(dim):
    """A published state formula says 153 for d = 16 where its forward pass makes 273 features."""
    x, y, _ = gaussian(7, head_dim=dim)
    f_x, f_y = taylor_features(x), taylor_features(y)
    assert f_x.shape[-1] == num_features(dim) == 1 + dim + dim * (dim + 1) // 2
    torch.testing.assert_close(f_x @ f_y.mT, 1 + x @ y.mT + (x @ y.mT) ** 2 / 2, atol=1e-12, rtol=1e-12)
    state = Taylor().init_state(1, 1, dim, 3, x)
    assert sum(t.numel() for t in state) == f_x.shape[-1] * (3 + 1)
    assert num_features(16) == 153


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 17, 70])
def test_pairs_and_features_equal_the_definition_forward_and_backward(length, causal, monkeypatch):
    monkeypatch.setattr(taylor, "CHUNK", 16)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    q, k, v = inputs
    mask = torch.arange(length) < torch.tensor([length, max(1, length // 2)])[:, None]
    for padding in (None, mask):
        rows = torch.ones_like(mask) if padding is None else mask
        s = q @ k.mT / 8**0.5
        weights = (1 + s + s**2 / 2) * rows[:, None, None, :]
        weights = weights.tril() if causal else weights
        exact = weights / weights.sum(-1, keepdim=True) @ v
        expected = torch.autograd.grad(exact.square().sum(), inputs, retain_graph=True)
        forms = [taylor_pairs(*_scaled(q, k), v, causal=causal, key_padding_mask=padding)]
        masked = [x if padding is None else torch.where(padding[:, None, :, None], x, 0) for x in (k, v)]
        if causal:
            forms.append(taylor_causal(*_scaled(q, masked[0]), masked[1], padding)[1])
        else:
            forms.append(taylor_bidirectional(*_scaled(q, masked[0]), masked[1], padding))
        for out in forms:
            torch.testing.assert_close(out, exact, atol=1e-12, rtol=1e-11)
            found = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


def test_no_weight_is_small_and_the_evaluation_does_not_cancel():
    x = torch.linspace(-4, 4, 1001, dtype=torch.float32)
    exact = 1 + x.double() + x.double() ** 2 / 2
    assert polynomial(x).min() >= 0.5
    assert ((polynomial(x).double() - exact) / exact).abs().max() < 3e-7


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 3.0])
def test_total_variation_from_softmax_is_bounded_by_the_range_of_the_log_ratio(scale, causal):
    """tanh(w/4) with w = g(min) - g(max), g(x) = log p(x) - x, min and max over the row's logits."""
    q, k, _ = gaussian(40, logit_scale=scale)
    logits = q @ k.mT / 8**0.5
    future = torch.ones(40, 40, dtype=torch.bool).triu(1) & causal
    softmax = logits.masked_fill(future, -torch.inf).softmax(-1)
    distance = (Taylor().matrix(q, k, causal=causal) - softmax).abs().sum(-1) / 2
    low, high = logits.masked_fill(future, torch.inf).amin(-1), logits.masked_fill(future, -torch.inf).amax(-1)
    ratio_range = (polynomial(low).log() - low) - (polynomial(high).log() - high)
    assert (distance <= torch.tanh(ratio_range / 4) + 1e-12).all()


def test_the_error_falls_with_the_cube_of_the_logits():
    errors = []
    for scale in (0.02, 0.04, 0.08):
        q, k, v = gaussian(40, logit_scale=scale)
        errors.append((Taylor()(q, k, v) - softmax_naive(q, k, v)).norm().log2().item())
    assert all(abs(b - a - 3) < 0.1 for a, b in pairwise(errors))


def test_cost_is_that_of_pairs_below_as_many_keys_as_features_and_linear_above():
    """d = 8 has 45 features."""
    flops = {}
    for length in (16, 32, 512, 1024):
        inputs = gaussian(length, batch=1, dtype=torch.float32)
        flops[length] = measure_flops(lambda *x: Taylor()(*x), *inputs).flops
    assert 3.8 < flops[32] / flops[16] < 4.1
    assert 1.95 < flops[1024] / flops[512] < 2.05


def test_split_and_resume_in_any_pieces_is_one_causal_run(monkeypatch):
    monkeypatch.setattr(taylor, "CHUNK", 16)
    q, k, v = gaussian(100, value_dim=5)
    operator = Taylor()
    whole = operator(q, k, v, causal=True)
    for cuts in ([0, 100], [0, 1, 64, 65, 100]):
        state, outs = operator.init_state(2, 2, 8, 5, q), []
        for a, b in pairwise(cuts):
            state, out = operator.step(state, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-12, rtol=1e-12)
