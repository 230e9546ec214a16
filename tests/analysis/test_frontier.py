"""The oracles are what they claim: optimal, within the budget, exact at full budget."""

import pytest
import torch

from attnlens.analysis import error, frontier
from attnlens.attention.softmax import softmax_weights


def problem(causal=False, mask=None):
    q, k, v = torch.randn(3, 2, 2, 12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = softmax_weights(2 * q, k, causal=causal, key_padding_mask=mask)
    return weights, v, frontier.prepare(weights, v, mask)


@pytest.mark.parametrize("causal", [False, True])
def test_full_budget_is_exact(causal):
    _, _, exact = problem(causal)
    assert max(frontier.rank_r_error(exact, 12)) < 1e-12
    assert max(frontier.top_k_error(exact, 12)) < 1e-12
    assert max(frontier.top_k_remainder_error(exact, 12)) < 1e-12


def test_truncated_svd_is_optimal_in_frobenius_norm():
    weights, _, exact = problem()
    generator = torch.Generator().manual_seed(2)
    for rank in (1, 3, 6):
        best = frontier.rank_r_distance(exact, rank)
        left, _, _ = torch.linalg.svd(weights)
        basis = left[..., :rank] + 0.05 * torch.randn(2, 2, 12, rank, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(basis).Q
        other = frontier.distance(basis @ (basis.mT @ weights), exact)
        assert all(a < b for a, b in zip(best, other, strict=True))


def test_rank_r_distance_is_the_distance_of_the_truncation():
    weights, v, exact = problem()
    left, singular, right = torch.linalg.svd(weights)
    truncated = left[..., :4] @ (singular[..., :4, None] * right[..., :4, :])
    assert frontier.rank_r_distance(exact, 4) == pytest.approx(frontier.distance(truncated, exact))
    assert frontier.rank_r_error(exact, 4) == pytest.approx(error.relative_error(truncated @ v, weights @ v))


def test_top_k_variation_is_the_mass_dropped_and_the_least():
    weights, _, exact = problem()
    kept = weights.sort(-1, descending=True).values[..., :4].sum(-1)
    assert frontier.top_k_total_variation(exact, 4) == pytest.approx((1 - kept).mean((0, 2)).tolist())
    subset = torch.zeros_like(weights)
    subset[..., :4] = weights[..., :4]
    other = error.total_variation(subset / subset.sum(-1, keepdim=True), weights)
    assert all(a < b for a, b in zip(frontier.top_k_total_variation(exact, 4), other, strict=True))


def test_rows_of_top_k_are_stochastic_and_causal():
    weights, _, exact = problem(causal=True)
    kept = frontier.top_k(exact, 3)
    assert torch.allclose(kept.sum(-1), torch.ones(2, 2, 12, dtype=torch.float64))
    assert (kept[weights == 0] == 0).all()
    assert ((kept > 0).sum(-1) == torch.arange(1, 13).clamp_max(3)).all()


def test_the_remainder_keeps_the_mass():
    """With equal weights outside the top k, spreading what is left over them is exact."""
    weights = torch.full((1, 1, 6, 6), 0.1, dtype=torch.float64)
    weights[..., 2] = 0.5
    exact = frontier.prepare(weights, torch.randn(1, 1, 6, 3, generator=torch.Generator().manual_seed(0)))
    assert max(frontier.top_k_remainder_error(exact, 1)) < 1e-12
    assert min(frontier.top_k_error(exact, 1)) > 1e-3


def test_zero_budget_gives_the_zero_answer():
    _, _, exact = problem()
    assert frontier.rank_r_error(exact, 0) == pytest.approx([1, 1])
    assert frontier.top_k_error(exact, 0) == pytest.approx([1, 1])


def test_what_a_budget_affords():
    n, d = 64, 32
    dense, triangle = torch.full((n,), n), torch.arange(1, n + 1)
    assert frontier.affordable_rank(4.0 * n * 7 * d, n, n, d) == 7
    assert frontier.affordable_k(4.0 * n * 7 * d, dense, d, d) == 7
    assert frontier.affordable_k(4.0 * n * 7 * d - 1, dense, d, d) == 6
    assert frontier.affordable_k(1e12, dense, d, d) == n
    k = frontier.affordable_k(4.0 * d * 500, triangle, d, d)
    entries = [int(triangle.clamp_max(j).sum()) for j in (k, k + 1)]
    assert entries[0] <= 500 < entries[1]


def test_padding_is_left_out():
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    _, v, exact = problem(mask=mask)
    holed = torch.where(mask[:, None, :, None], v, torch.nan)
    again = frontier.prepare(exact.weights, holed, mask)
    assert frontier.rank_r_error(again, 3) == frontier.rank_r_error(exact, 3)
    assert frontier.top_k_error(again, 3) == frontier.top_k_error(exact, 3)
