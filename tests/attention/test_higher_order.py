"""Higher order attention: loops as oracle, the additive part of the logits, its bound, pooling, three modes."""

import math

import pytest
import torch

from attnlens.analysis.budget import exact_flops, operator_flops
from attnlens.attention.higher_order import HigherOrder
from attnlens.attention.modewise import Modewise
from attnlens.attention.softmax import softmax_naive
from attnlens.testing.inputs import EXACT, gaussian
from tests.grids import additive


def pools(x, coordinate, real):
    """Means over the real tokens that share a coordinate, for each token."""
    shared = (coordinate[:, None] == coordinate) & real
    return (shared.double() / shared.sum(-1, keepdim=True).clamp_min(1)) @ x


def naive(q, k, v, fixed, mask=None):
    """Token by token: each mode's logits from pools, their sum, one softmax over the real tokens."""
    n, token, size = q.shape[2], torch.arange(q.shape[2]), 1
    real = torch.ones(q.shape[0], 1, 1, n, dtype=torch.bool) if mask is None else mask[:, None, None]
    scores = torch.zeros(1, dtype=torch.float64)
    for side in (*reversed(fixed), n):
        coordinate = token // size % side
        size *= side
        scores = scores + pools(q, coordinate, real) @ pools(k, coordinate, real).mT / q.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(~real, -torch.inf), -1) @ v


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("length", "fixed"), [(1, (1,)), (24, (6,)), (23, (6,)), (5, (8,)), (24, (3, 4)), (29, (2, 4)), (9, (1, 4))]
)
def test_equals_the_definition_forward_and_backward(length, fixed, padded):
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    mask = torch.arange(length) < torch.tensor([length, max(1, length - 4)])[:, None] if padded else None
    operator = HigherOrder(fixed[-1], fixed[0] if len(fixed) == 2 else None)
    shown = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    found = operator(*inputs, key_padding_mask=mask).transpose(1, 2)[shown]
    zeroed = [torch.where(shown[:, None, :, None], x, 0) for x in inputs]
    expected = naive(*zeroed, fixed, mask).transpose(1, 2)[shown]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = [torch.autograd.grad(x, inputs, direction) for x in (found, expected)]
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-9)


def test_additive_logits_are_exact_with_means_and_far_off_with_sums():
    q, k = additive(4, 6, seed=0)
    v = gaussian(24)[2]
    exact = softmax_naive(q, k, v)
    torch.testing.assert_close(HigherOrder(6)(q, k, v), exact, atol=1e-12, rtol=0)
    assert (HigherOrder(6, sum_pooling=True)(q, k, v) - exact).abs().max() > 0.5
    assert (HigherOrder(4)(q, k, v) - exact).abs().max() > 0.1  # the grid of another width


def test_sums_are_logits_times_the_square_of_the_other_modes():
    q, k, _ = gaussian(24)
    loud = HigherOrder(6, sum_pooling=True).logits(q, k)
    for mode, (with_sums, with_means) in enumerate(zip(loud, HigherOrder(6).logits(q, k), strict=True)):
        torch.testing.assert_close(with_sums, with_means * (6, 4)[mode] ** 2, atol=1e-10, rtol=1e-10)


def rest(operator, q, k):
    """The logits less the sum of the terms, each row centered, on a grid of 4 x 6."""
    rows, columns = operator.logits(q, k)
    terms = rows[:, :, :, None, :, None] + columns[:, :, None, :, None, :]
    gap = (q @ k.mT * q.shape[-1] ** -0.5).unflatten(3, (4, 6)).unflatten(2, (4, 6)) - terms
    return gap - gap.mean((2, 3, 4, 5), keepdim=True)


def test_the_terms_are_the_least_squares_fit_of_a_sum_to_the_logits():
    """The rest has no mean over any pair of rows or of columns, and any other sum leaves more, mode-wise sums too."""
    q, k, _ = gaussian(24)
    left = rest(HigherOrder(6), q, k)
    assert left.mean((3, 5)).abs().max() < 1e-12
    assert left.mean((2, 4)).abs().max() < 1e-12
    for average in (False, True):
        assert rest(Modewise(6, average=average), q, k).norm() > 1.1 * left.norm()
    shift = torch.randn(4, 1, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (left + 0.1 * (shift - shift.mean())).norm() > left.norm()


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_bound_holds_under_padding_and_is_near_for_small_logits(scale):
    q, k, v = gaussian(23, logit_scale=scale)
    mask = torch.arange(23) < torch.tensor([23, 11])[:, None]
    for operator in (HigherOrder(6), HigherOrder(3, 2), HigherOrder(6, sum_pooling=True)):
        bound = operator.error_bound(q, k, v, key_padding_mask=mask)
        error = (operator(q, k, v, key_padding_mask=mask) - softmax_naive(q, k, v, key_padding_mask=mask)).norm(dim=-1)
        shown = mask[:, None].expand_as(error)
        assert (error <= bound)[shown].all()
    if scale == 0.1:
        tight = HigherOrder(6).error_bound(q, k, v, key_padding_mask=mask)[shown].median()
        assert tight < 30 * (HigherOrder(6)(q, k, v) - softmax_naive(q, k, v)).norm(dim=-1)[shown].median()


def test_one_row_is_softmax_and_four_columns_are_not():
    q, k, v = gaussian(20)
    exact = softmax_naive(q, k, v)
    assert (HigherOrder(20)(q, k, v) - exact).abs().max() < EXACT
    assert (HigherOrder(20, 3)(q, k, v) - exact).abs().max() < EXACT
    assert (HigherOrder(1)(q, k, v) - exact).abs().max() < EXACT
    assert (HigherOrder(4)(q, k, v) - exact).abs().max() > 0.1


def test_cost_grows_like_the_power_three_halves_on_square_grids():
    def cost(n):
        return operator_flops(HigherOrder(math.isqrt(n)), *gaussian(n, batch=1, head_dim=64), causal=False)

    slope = math.log2(cost(4096) / cost(1024)) / 2
    assert abs(slope - 1.5) < 0.1
    assert cost(1024) < 0.1 * exact_flops(*gaussian(1024, batch=1, head_dim=64), causal=False)


def test_causal_and_bad_arguments_are_refused():
    q, k, v = gaussian(5)
    with pytest.raises(ValueError, match="`causal=True`"):
        HigherOrder(3)(q, k, v, causal=True)
    with pytest.raises(ValueError, match="`num_columns` must be at least 1"):
        HigherOrder(0)
    with pytest.raises(ValueError, match="`num_rows` must be at least 1"):
        HigherOrder(3, 0)
