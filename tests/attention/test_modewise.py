"""Mode-wise attention: the dense Kronecker matrix and a token-wise form as oracles, additive logits, its bound."""

import math

import pytest
import torch

from attnlens.analysis.budget import exact_flops, operator_flops
from attnlens.attention.modewise import Modewise, unfolding
from attnlens.attention.softmax import softmax_naive
from attnlens.testing.inputs import EXACT, gaussian
from tests.grids import additive


def naive(q, k, v, fixed, average, mask=None):
    """A logit of two slices: the scores of all pairs of tokens that differ in nothing but this mode, summed."""
    n, token, size = q.shape[2], torch.arange(q.shape[2]), 1
    real = torch.ones(q.shape[0], 1, 1, n, dtype=torch.bool) if mask is None else mask[:, None, None]
    pairs = q @ k.mT / q.shape[-1] ** 0.5
    scores = torch.zeros(1, dtype=torch.float64)
    for side in (*reversed(fixed), n):
        coordinate, other = token // size % side, token // size // side * size + token % size
        size *= side
        # member[t, a]: does token t lie in the slice a of this mode?
        member = torch.nn.functional.one_hot(coordinate).double()
        alike = (other[:, None] == other) & real & real.mT
        total, count = (member.mT @ torch.where(alike, x, 0) @ member for x in (pairs, torch.ones_like(pairs)))
        term = total / (count if average else count.sqrt()).clamp_min(1)
        scores = scores + term[:, :, coordinate][..., coordinate]
    return torch.softmax(scores.masked_fill(~real, -torch.inf), -1) @ v


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("length", "fixed"), [(1, (1,)), (24, (6,)), (23, (6,)), (5, (8,)), (24, (3, 4)), (29, (2, 4)), (9, (1, 4))]
)
def test_equals_the_definition_forward_and_backward(length, fixed, padded, average):
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    mask = torch.arange(length) < torch.tensor([length, max(1, length - 4)])[:, None] if padded else None
    operator = Modewise(fixed[-1], fixed[0] if len(fixed) == 2 else None, average)
    shown = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    found = operator(*inputs, key_padding_mask=mask).transpose(1, 2)[shown]
    zeroed = [torch.where(shown[:, None, :, None], x, 0) for x in inputs]
    expected = naive(*zeroed, fixed, average, mask).transpose(1, 2)[shown]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = [torch.autograd.grad(x, inputs, direction) for x in (found, expected)]
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-9)


def test_the_matrix_is_the_kronecker_product_of_its_modes():
    q, k, _ = gaussian(24)
    parts = [torch.softmax(x, -1) for x in Modewise(6).logits(q, k)]
    assert [x.shape[-1] for x in parts] == [4, 6]
    for example in range(2):
        for head in range(2):
            expected = torch.kron(*(x[example, head] for x in parts))
            torch.testing.assert_close(Modewise(6).matrix(q, k)[example, head], expected, atol=1e-13, rtol=0)


def test_the_scale_is_that_of_random_features():
    """Gaussian logits of standard deviation one, whatever the length of a slice; averages of it shrink."""
    q, k, _ = gaussian(1024, batch=8)
    loud, quiet = (Modewise(16, average=average).logits(q, k)[0] for average in (False, True))
    assert abs(loud.std() - 1) < 0.05
    torch.testing.assert_close(quiet * 4, loud, atol=1e-12, rtol=0)


def test_unfoldings_are_those_of_the_tensor():
    x = torch.arange(24.0).view(1, 1, 2, 3, 2, 2)
    for mode, side in enumerate((2, 3, 2)):
        for index in range(side):
            assert torch.equal(unfolding(x, mode)[0, 0, index], x.select(2 + mode, index).flatten())


def test_additive_logits_are_exact_with_averages_only():
    q, k = additive(4, 6, seed=0)
    v = gaussian(24)[2]
    exact = softmax_naive(q, k, v)
    torch.testing.assert_close(Modewise(6, average=True)(q, k, v), exact, atol=1e-12, rtol=0)
    assert (Modewise(6)(q, k, v) - exact).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_bound_holds_under_padding(scale):
    q, k, v = gaussian(23, logit_scale=scale)
    mask = torch.arange(23) < torch.tensor([23, 11])[:, None]
    for operator in (Modewise(6), Modewise(6, average=True), Modewise(3, 2)):
        bound = operator.error_bound(q, k, v, key_padding_mask=mask)
        error = (operator(q, k, v, key_padding_mask=mask) - softmax_naive(q, k, v, key_padding_mask=mask)).norm(dim=-1)
        assert (error <= bound)[mask[:, None].expand_as(error)].all()


def test_one_row_and_one_column_are_softmax_and_four_columns_are_not():
    q, k, v = gaussian(20)
    exact = softmax_naive(q, k, v)
    for operator in (Modewise(20), Modewise(20, 3), Modewise(1)):
        assert (operator(q, k, v) - exact).abs().max() < EXACT
    assert (Modewise(4)(q, k, v) - exact).abs().max() > 0.1


def test_cost_grows_like_the_power_three_halves_on_square_grids():
    def cost(n):
        return operator_flops(Modewise(math.isqrt(n)), *gaussian(n, batch=1, head_dim=64), causal=False)

    slope = math.log2(cost(4096) / cost(1024)) / 2
    assert abs(slope - 1.5) < 0.1
    assert cost(1024) < 0.2 * exact_flops(*gaussian(1024, batch=1, head_dim=64), causal=False)


def test_causal_and_bad_arguments_are_refused():
    q, k, v = gaussian(5)
    with pytest.raises(ValueError, match="`causal=True`"):
        Modewise(3)(q, k, v, causal=True)
    with pytest.raises(ValueError, match="`num_columns` must be at least 1"):
        Modewise(0)
