"""Every measure on inputs whose answer is known, and the same with padding that holds NaN."""

import math

import pytest
import torch

from attnlens.analysis import error
from attnlens.attention.softmax import softmax_weights


def problem(causal=False):
    q, k, v = torch.randn(3, 2, 3, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = softmax_weights(q, k, causal=causal)
    return weights, v, weights @ v


def padded(x, lengths=(6, 9)):
    """`x` (2, h, 9, .) with NaN after each length, and the mask."""
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    return torch.where(mask[:, None, :, None], x, torch.nan), mask


def test_a_right_answer_has_no_error():
    weights, _, out = problem()
    assert error.relative_error(out, out) == [0, 0, 0]
    assert error.total_variation(weights, weights) == [0, 0, 0]
    assert error.max_row_error(out, out) == [0, 0, 0]


def test_relative_error_is_one_for_zero_and_scales():
    _, _, out = problem()
    assert error.relative_error(torch.zeros_like(out), out) == pytest.approx([1, 1, 1])
    assert error.relative_error(1.25 * out, out) == pytest.approx([0.25] * 3)


def test_heads_are_separate():
    _, _, out = problem()
    wrong = out.clone()
    wrong[:, 1] *= 3
    assert error.relative_error(wrong, out) == pytest.approx([0, 2, 0])


def test_nothing_to_be_right_about():
    zero = torch.zeros(1, 1, 2, 2)
    assert error.relative_error(zero, zero) == [0]
    assert error.relative_error(zero + 1, zero) == [math.inf]


def test_padding_is_left_out_of_everything():
    weights, v, out = problem()
    wrong, _ = padded(out + 0.1)
    noisy, mask = padded(weights * 1.5 - 0.05)
    exact, _ = padded(out)
    reference = torch.where(mask[:, None, :, None], weights, torch.nan)
    values = [
        error.relative_error(wrong, exact, mask),
        error.max_row_error(wrong, exact, mask),
        error.row_sum_defect(noisy, mask),
        error.negative_mass(noisy, mask),
        error.total_variation(noisy, reference, mask),
        error.operator_norm_error(wrong, exact, error.operator_scale(reference, padded(v)[0], mask), mask),
    ]
    again = [
        error.relative_error(torch.where(wrong.isnan(), 7.0, wrong), exact, mask),
        error.max_row_error(torch.where(wrong.isnan(), 7.0, wrong), exact, mask),
        error.row_sum_defect(torch.where(noisy.isnan(), 7.0, noisy), mask),
        error.negative_mass(torch.where(noisy.isnan(), -7.0, noisy), mask),
        error.total_variation(torch.where(noisy.isnan(), 7.0, noisy), reference, mask),
        error.operator_norm_error(
            torch.where(wrong.isnan(), 7.0, wrong), exact, error.operator_scale(reference, padded(v)[0], mask), mask
        ),
    ]
    assert all(math.isfinite(x) for each in values for x in each)
    assert values == again


def test_padded_equals_short():
    weights, _, _ = problem()
    short = error.total_variation(weights[:1, :, :6] * 0.9, weights[:1, :, :6])
    mask = torch.tensor([[True] * 6 + [False] * 3])
    assert error.total_variation(weights[:1] * 0.9, weights[:1], mask) == pytest.approx(short)


@pytest.mark.parametrize("causal", [False, True])
def test_mean_value_is_uniform_attention(causal):
    _, v, _ = problem()
    uniform = softmax_weights(torch.zeros_like(v), torch.zeros_like(v), causal=causal) @ v
    assert torch.allclose(error.mean_value(v, causal=causal).double(), uniform)


@pytest.mark.parametrize("causal", [False, True])
def test_mean_value_reads_real_values_only(causal):
    _, v, _ = problem()
    holed, mask = padded(v)
    real = error.mean_value(holed, causal=causal, key_padding_mask=mask)[:1, :, :6]
    assert torch.allclose(real, error.mean_value(v[:1, :, :6], causal=causal))


def test_row_measures_by_hand():
    exact = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])[None, None]
    weights = torch.tensor([[0.9, 0.3, -0.1], [0.0, 0.0, 1.0]])[None, None]
    assert error.row_sum_defect(weights) == pytest.approx([0.1])
    assert error.negative_mass(weights) == pytest.approx([0.05])
    assert error.total_variation(weights, exact) == pytest.approx([(0.35 + 0.5) / 2])
    assert error.visited_fraction(weights, exact) == pytest.approx([4 / 5])


def test_kl_by_hand_and_infinite_outside_the_support():
    exact = torch.tensor([[0.25, 0.75, 0.0]])[None, None]
    assert error.kl_divergence(torch.tensor([[1.0, 0.0, 0.0]])[None, None], exact) == pytest.approx([math.log(4)])
    assert error.kl_divergence(torch.tensor([[0.0, 0.0, 1.0]])[None, None], exact) == [math.inf]


def test_max_row_error_sees_one_row():
    _, _, out = problem()
    wrong = out.clone()
    wrong[0, 0, 3] = 0
    expected = out[0, 0, 3].norm() / out[:, 0].norm(dim=-1).max()
    assert error.max_row_error(wrong, out)[0] == pytest.approx(float(expected))


def test_operator_norm_error_is_at_most_the_error_on_weights():
    """‖(P~ - P) V‖ <= ‖P~ - P‖ ‖V‖."""
    weights, v, out = problem()
    wrong = weights + 0.01
    bound = torch.linalg.matrix_norm(wrong - weights, ord=2) / torch.linalg.matrix_norm(weights, ord=2)
    found = error.operator_norm_error(wrong @ v, out, error.operator_scale(weights, v))
    assert all(0 < a <= b for a, b in zip(found, bound.amax(0).tolist(), strict=True))


def test_without_the_sink_a_method_that_knows_only_the_sink_is_wrong():
    _, v, _ = problem()
    exact = torch.full((2, 3, 9, 9), 0.01, dtype=torch.float64)
    exact[..., 4] = 0.92
    only_sink = torch.zeros_like(exact)
    only_sink[..., 4] = 0.92
    v[:, :, 4] = 5
    assert max(error.relative_error(only_sink @ v, exact @ v)) < 0.1
    assert error.sink_removed_error(only_sink, exact, v) == pytest.approx([1, 1, 1])
