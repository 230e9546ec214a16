"""Linear attention against its definition, at the ends of the number range, and as a recurrence."""

from itertools import pairwise

import pytest
import torch

from attnlens.attention.linear import Linear, elu_features, linear_naive


def inputs(length, dtype=torch.float64, scale=1.0, value_dim=5):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 3, length, w, generator=generator, dtype=torch.float64) for w in (8, 8, value_dim))
    return [(x * s).to(dtype).requires_grad_() for x, s in ((q, scale), (k, scale), (v, 1.0))]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 64, 130])
def test_fast_form_equals_the_definition_forward_and_backward(length, is_causal):
    tensors = inputs(length)
    mask = torch.arange(length) < torch.tensor([length, max(1, length // 3)])[:, None]
    for padding in (None, mask):
        out = Linear()(*tensors, causal=is_causal, key_padding_mask=padding)
        exact = linear_naive(*tensors, causal=is_causal, key_padding_mask=padding)
        torch.testing.assert_close(out, exact, atol=1e-12, rtol=1e-10)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = torch.autograd.grad((out * cotangent).sum(), tensors)
        expected = torch.autograd.grad((exact * cotangent).sum(), tensors)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_features_are_elu_plus_one_with_relative_accuracy_in_float32():
    """elu(x) + 1 as written is 0 in float32 from x = -17 on, and with it the normalizer."""
    x = torch.tensor([-40.0, -20.0, -1.0, 0.0, 0.5, 30.0])
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    assert torch.nn.functional.elu(x)[1] + 1 == 0
    torch.testing.assert_close(elu_features(x).double(), exact, atol=0, rtol=1e-6)
    point = torch.zeros(1, requires_grad=True)
    elu_features(point).backward()
    assert point.grad == 1, "the derivative of elu at 0 is 1 from both sides"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shift", [-30.0, -500.0, 50.0])
def test_rows_sum_to_one_where_the_literal_formula_underflows(shift, is_causal):
    q, k, _ = (x.detach() for x in inputs(70, torch.float32))
    for queries, keys in ((q + shift, k), (q, k + shift), (q + shift, k + shift)):
        sums = Linear().matrix(queries, keys, causal=is_causal).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)


def test_shifting_a_negative_query_changes_nothing():
    """e^{x + c} = e^c e^x cancels: all-negative queries deep in the tail get the same rows as shallow ones."""
    q, k, v = (x.detach() for x in inputs(12))
    low = -q.abs() - 1
    torch.testing.assert_close(Linear()(low, k, v), Linear()(low - 700, k, v), atol=1e-12, rtol=1e-10)


def test_split_and_resume_in_any_pieces_is_one_causal_run():
    q, k, v = (x.detach() for x in inputs(100))
    operator = Linear()
    whole = operator(q, k, v, causal=True)
    for cuts in ([0, 100], [0, 1, 64, 65, 100], list(range(101))):
        state, outs = operator.init_state(2, 3, 8, 5, q), []
        for a, b in pairwise(cuts):
            state, out = operator.step(state, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-12, rtol=1e-12)
    assert sum(x[0, 0].numel() for x in state) == 8 * (5 + 1)
