"""Projections and positive features against their distribution: mean, variance, and the gain from orthogonality."""

import math

import pytest
import torch

from attnlens.linalg.random_features import gaussian_projections, positive_log_features

DRAWS = 2500


def estimates(num_features, *, orthogonal, norm=0.5, dim=8, draws=DRAWS):
    """`draws` estimates of exp(<x, y>) for one pair, and its true value with |x + y|^2."""
    generator = torch.Generator().manual_seed(num_features)
    pair = torch.randn(2, 1, dim, generator=generator, dtype=torch.float64)
    x, y = norm * pair / pair.norm(dim=-1, keepdim=True)
    found = []
    for _ in range(draws):
        w = gaussian_projections(num_features, dim, orthogonal=orthogonal, generator=generator)
        found.append((positive_log_features(x, w) + positive_log_features(y, w)).exp().sum())
    return torch.stack(found), math.exp((x * y).sum()), (x + y).square().sum().item()


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("num_features", [1, 8, 20])
def test_the_kernel_estimate_is_unbiased(num_features, orthogonal):
    found, exact, _ = estimates(num_features, orthogonal=orthogonal)
    assert abs(found.mean().item() - exact) < 4 * found.std().item() / DRAWS**0.5


@pytest.mark.parametrize("num_features", [1, 16])
def test_variance_of_independent_features_is_that_of_the_formula(num_features):
    """Var = SM^2 (e^{|x + y|^2} - 1) / m."""
    found, exact, square = estimates(num_features, orthogonal=False)
    expected = exact**2 * (math.exp(square) - 1) / num_features
    assert found.var().item() == pytest.approx(expected, rel=0.15)


def test_orthogonal_features_have_a_smaller_mean_square_error():
    """With s = |x + y|^2 the variance falls from s + s^2/2 to s + s^2/2 - s^2 (d - 1) / (2 (d + 2)) to second order."""
    dim, draws = 8, 40000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, dim, generator=generator, dtype=torch.float64)
    x = x / x.norm() / 4
    errors = []
    for orthogonal in (False, True):
        w = gaussian_projections(dim * draws, dim, orthogonal=orthogonal, generator=generator)
        products = (2 * positive_log_features(x, w)).exp() * draws
        errors.append((products.view(draws, dim).sum(-1) - x.square().sum().exp()).square().mean().item())
    square = 0.25
    expected = 1 - square * (dim - 1) / (2 * (dim + 2)) / (1 + square / 2)
    assert errors[1] / errors[0] == pytest.approx(expected, abs=0.03)
    assert errors[1] < 0.97 * errors[0]


def test_rows_are_orthogonal_within_blocks_and_as_long_as_gaussian_vectors():
    dim, blocks = 6, 500
    w = gaussian_projections(dim * blocks + 2, dim, orthogonal=True, generator=torch.Generator().manual_seed(0))
    assert w.shape == (dim * blocks + 2, dim)
    gram = (w[:-2].unflatten(0, (blocks, dim))) @ (w[:-2].unflatten(0, (blocks, dim))).mT
    off = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-12
    square = w.square().sum(-1)
    assert square.mean().item() == pytest.approx(dim, rel=0.05)
    assert square.var().item() == pytest.approx(2 * dim, rel=0.15), "chi-square norms; constant ones would bias"
    covariance = w.mT @ w / w.shape[0]
    assert (covariance - torch.eye(dim)).abs().max() < 0.1
    assert w.mean(0).abs().max() < 0.1, "QR without its signs removed prefers one half space"


def test_draws_repeat_with_the_generator():
    first, second = (
        gaussian_projections(7, 4, orthogonal=True, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, second)
