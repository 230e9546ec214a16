"""Generalized exponential features: moments by Monte Carlo, the optimum by search, the statistics by a loop."""

import pytest
import torch

from attnlens.linalg.exponential_features import log_second_moment, optimal_coefficients, pair_moment


def draws(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("a", [0.0, -0.05, -0.5])
def test_the_estimate_is_unbiased_and_has_the_second_moment_of_the_formula(a):
    dim, count = 5, 400_000
    x, y = 0.4 * draws(2, dim, seed=1)
    coefficients = a * torch.linspace(0.5, 1.5, dim, dtype=torch.float64)
    w = draws(count, dim)
    exponent = (w.square() * coefficients * 2).sum(-1) + w @ ((1 - 4 * coefficients).sqrt() * (x + y))
    log_d = torch.log1p(-4 * coefficients).sum() / 2
    found = (exponent + log_d - (x.square().sum() + y.square().sum()) / 2 - x @ y).exp()
    assert abs(found.mean().item() - 1) < 4 * found.std().item() / count**0.5
    squares = found.square()
    expected = log_second_moment(x + y, coefficients).exp().item()
    assert abs(squares.mean().item() - expected) < 5 * squares.std().item() / count**0.5


def test_without_a_gaussian_factor_it_is_the_moment_of_positive_features():
    z = draws(4, 6)
    torch.testing.assert_close(log_second_moment(z, torch.zeros(6, dtype=torch.float64)), z.square().sum(-1))


@pytest.mark.parametrize("moment", [0.0, 0.01, 0.3, 2.0, 40.0])
def test_the_coefficient_is_the_best_of_a_search(moment):
    best = optimal_coefficients(torch.tensor([moment], dtype=torch.float64))
    assert best.item() <= 0
    grid = -torch.linspace(0, 12, 60_001, dtype=torch.float64)[:, None]
    values = log_second_moment(torch.full_like(grid, moment**0.5), grid)
    assert log_second_moment(torch.full_like(best, moment**0.5), best).item() <= values.min().item() + 1e-12
    assert grid[values.argmin()].item() == pytest.approx(best.item(), abs=4e-4)


def test_the_moment_is_the_mean_over_pairs_of_real_tokens():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 2, 3, 7, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 3])[:, None]
    for padding in (None, mask):
        found = pair_moment(x, y, padding)
        for h in range(3):
            examples = []
            for e, length in enumerate((7, 7) if padding is None else (7, 3)):
                z = x[e, h, :length, None] + y[e, h, None, :length]
                examples.append((z[..., :, None] * z[..., None, :]).mean((0, 1)))
            torch.testing.assert_close(found[h], torch.stack(examples).mean(0))
    poisoned = torch.where(mask[:, None, :, None], x, torch.nan)
    torch.testing.assert_close(pair_moment(poisoned, poisoned, mask), pair_moment(x, x, mask))
