"""Polynomial attention: the dense definition, both ends of the degree, the range of float32, memory."""

import itertools
import math

import pytest
import torch

from attnlens.analysis.budget import exact_flops, operator_flops
from attnlens.attention.polynomial import Polynomial
from attnlens.linalg.dense import softmax_naive
from attnlens.linalg.polynomial_kernel import ROWS, dense
from attnlens.testing.inputs import gaussian


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("degree", "constant"), [(0, 0), (1, 0), (2, 0.5), (2.5, 0), (3, 0), (4, 1), (8, 0)])
def test_equals_the_definition_forward_and_backward(degree, constant, causal):
    length = ROWS + 13
    tensors = [x.requires_grad_() for x in gaussian(length, value_dim=5, logit_scale=2.0)]
    mask = torch.arange(length) < torch.tensor([length, length // 2])[:, None]
    operator = Polynomial(degree, constant, normalize=degree == 4)
    for padding in (None, mask):
        masks = {"causal": causal, "key_padding_mask": padding}
        found = operator(*tensors, **masks)
        expected = dense(*tensors, degree, constant, degree == 4, **masks)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
        cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        pulled = [torch.autograd.grad((out * cotangent).sum(), tensors) for out in (found, expected)]
        for a, b in zip(*pulled, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_degree_zero_gives_every_key_the_share_of_one_in_length_plus_one():
    """Not 1/n: the one in the denominator is a key of its own."""
    q, k, _ = gaussian(9)
    weights = Polynomial(0).matrix(q, k)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 10), atol=1e-15, rtol=0)
    causal = Polynomial(0).matrix(q, k, causal=True)
    torch.testing.assert_close(causal[0, 0, :, 0], 1 / (torch.arange(9).double() + 2), atol=1e-15, rtol=0)


def test_infinite_degree_is_hardmax_only_where_a_logit_exceeds_one():
    """The maximum is that of |s|; below one every weight tends to zero, whatever is largest."""
    q = torch.tensor([[1.0, 0.0], [0.4, 0.0], [0.0, -2.0]], dtype=torch.float64)[None, None]
    k = torch.tensor([[3.0, 0.5], [-3.0, 0.1], [1.0, 1.5]], dtype=torch.float64)[None, None]
    weights = Polynomial(600).matrix(q, k)[0, 0]
    expected = torch.tensor([[0.5, 0.5, 0], [0, 0, 0], [0, 0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)


def test_a_constant_that_grows_with_the_degree_leads_to_softmax():
    """(p + s)^p / p^p = e^s (1 - s^2/(2p) + ...): the error halves as p doubles."""
    q, k, v = gaussian(40)
    exact = softmax_naive(q, k, v)
    errors = [((Polynomial(p, p)(q, k, v) - exact).norm() / exact.norm()).item() for p in (32, 64, 128)]
    assert all(0.8 < math.log2(a / b) < 1.1 for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.02


def test_no_power_overflows_in_float32_and_no_gradient_either():
    """|s|^p leaves float32 from p = 32 on at |s| = 20; divided by the row's largest it never does."""
    q, k, v = (x.float().requires_grad_() for x in gaussian(40, logit_scale=20.0))
    assert dense(q, k, v, 64).isnan().any()
    out = Polynomial(64)(q, k, v)
    out.sum().backward()
    assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad))
    torch.testing.assert_close(out.double(), Polynomial(64)(q.double(), k.double(), v.double()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_key_has_no_kernel_value_although_a_zero_key_has_one(causal):
    """The mask acts after the kernel: (c + <q, 0>)^p = c^p, and no score makes an even power vanish."""
    q, k, v = gaussian(12)
    mask = torch.arange(12) < torch.tensor([12, 7])[:, None]
    padded = Polynomial(4, 1.0)(q, k, v, causal=causal, key_padding_mask=mask)[1:, :, :7]
    short = Polynomial(4, 1.0)(*(x[1:, :, :7] for x in (q, k, v)), causal=causal)
    torch.testing.assert_close(padded, short, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_of_size_length_squared_is_kept_for_the_backward_pass(causal):
    saved = []
    tensors = [x.requires_grad_() for x in gaussian(512, batch=1)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        Polynomial(4)(*tensors, causal=causal)
    assert max(saved) <= 2 * 512 * ROWS


def test_costs_what_exact_attention_does():
    """Exponent 2 in the length; the causal form is half of it, since a chunk reads no key behind its last."""
    costs = {}
    for n in (512, 1024):
        tensors = gaussian(n, batch=1, head_dim=64)
        costs[n] = [operator_flops(Polynomial(4), *tensors, causal=causal) for causal in (False, True)]
        assert 0.9 < costs[n][0] / exact_flops(*tensors, causal=False) < 1.1
    assert 3.9 < costs[1024][0] / costs[512][0] < 4.1
    assert costs[1024][1] < 0.6 * costs[1024][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.5,), "`degree` must be 0 or at least 1, got 0.5"), ((2, -1), "`constant` must be at least 0, got -1")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Polynomial(*arguments)
