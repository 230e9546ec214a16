"""Trigonometric features: mean, variance and covariance of the Gaussian kernel they estimate, against many draws."""

import pytest
import torch

from attnlens.linalg.random_features import gaussian_projections
from attnlens.linalg.trigonometric_features import (
    feature_covariance,
    gaussian_values,
    trigonometric_features,
    unit_length,
)

DRAWS = 40000


def vectors(count, dim=5, seed=0):
    return unit_length(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@pytest.fixture(params=[0.6, 1.5])
def draws(request):
    """The estimates of 2 x 3 pairs from one independent frequency, DRAWS times; the kernel; points and sigma."""
    x, y, sigma = vectors(2, seed=1), vectors(3, seed=2), torch.tensor(request.param, dtype=torch.float64)
    y[0] = x[0]
    w = gaussian_projections(DRAWS, 5, orthogonal=False, generator=torch.Generator().manual_seed(3)) / sigma
    phi = [trigonometric_features(z.expand(DRAWS, -1, -1), w[:, None]) for z in (x, y)]
    return phi[0] @ phi[1].mT, gaussian_values(x, y, sigma), x, y, sigma


def test_the_estimate_is_unbiased_and_features_have_unit_length(draws):
    found, exact, x, _, sigma = draws
    assert ((found.mean(0) - exact).abs() <= 4 * found.std(0) / DRAWS**0.5 + 1e-12).all()
    w = gaussian_projections(7, 5, orthogonal=True, generator=torch.Generator().manual_seed(3)) / sigma
    torch.testing.assert_close(trigonometric_features(x, w).norm(dim=-1), torch.ones(2, dtype=torch.float64))


def test_covariances_are_those_of_the_formula(draws):
    found, exact, x, y, sigma = draws
    centered = found - exact
    products = centered[..., :, None] * centered[..., None, :]
    formula = feature_covariance(x, y, sigma[None, None])
    assert ((products.mean(0) - formula).abs() <= 5 * products.std(0) / DRAWS**0.5 + 1e-12).all()
    variance = (1 - gaussian_values(x, y, sigma / 2**0.5)).square() / 2
    torch.testing.assert_close(formula.diagonal(dim1=-2, dim2=-1), variance, atol=1e-12, rtol=1e-12)
    assert variance[0, 0].abs() < 1e-15


def test_unit_length_keeps_zero_and_its_gradient_finite():
    x = torch.zeros(2, 3, dtype=torch.float64)
    x[1] = torch.tensor([3.0, 0.0, 4.0])
    x.requires_grad_()
    unit = unit_length(x)
    assert unit.tolist() == [[0, 0, 0], [0.6, 0, 0.8]]
    unit.sum().backward()
    assert x.grad.isfinite().all()
