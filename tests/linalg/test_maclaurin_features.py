"""Maclaurin features: products written out, the law of the degrees, mean and variance over draws, the best measure."""

import math

import pytest
import torch

from attnlens.linalg.maclaurin_features import (
    capacities,
    coefficients,
    degree_measure,
    draw_factors,
    estimate_variance,
    factor_moment,
    maclaurin_features,
    systematic_degrees,
)

DRAWS = 20000


def vectors(count, radius, dim=5, seed=0):
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return radius * torch.nn.functional.normalize(x, dim=-1)


def draw(measure, num_features, dim, heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    degrees = systematic_degrees(measure, num_features, torch.rand(heads, dtype=torch.float64, generator=generator))
    widths, scales = capacities(measure, num_features), coefficients(degrees, measure)
    return draw_factors(degrees, scales, widths, dim, generator), degrees, scales, widths


def estimates(x, y, measure, num_features, heads=DRAWS):
    """<phi(x), phi(y)> of every pair, one draw a head."""
    parts = draw(measure, num_features, x.shape[-1], heads)
    phi = [maclaurin_features(z.expand(1, heads, -1, -1), *parts) for z in (x, y)]
    return (phi[0] * phi[1]).sum(-1)[0]


def test_features_are_the_products_of_their_factors():
    x, measure = vectors(4, 1.3), degree_measure(9, 0, 1.4)
    factors, degrees, scales, widths = draw(measure, 20, 5, 3)
    found = maclaurin_features(x.expand(1, 3, -1, -1), factors, degrees, scales, widths)[0]
    levels = factors.sign().split(widths, 1)
    for head in range(3):
        for f in range(20):
            degree = int(degrees[head, f])
            product = torch.ones(4, dtype=torch.float64)
            for t in range(degree):
                product = product * (x @ levels[t][head, f])
            product = product / (20 * measure[degree] * math.factorial(degree)) ** 0.5
            torch.testing.assert_close(found[head, :, f], product)


@pytest.mark.parametrize("radius", [None, 0.7, 2.0])
def test_degrees_have_the_law_of_the_measure_and_counts_off_by_one_at_most(radius):
    measure, m = degree_measure(12, 0, radius), 24
    degrees = systematic_degrees(measure, m, torch.rand(DRAWS, dtype=torch.float64))
    counts = torch.stack([(degrees == n).sum(-1) for n in range(13)], -1).double()
    assert ((counts - m * measure).abs() <= 1 + 1e-9).all()
    assert ((counts.mean(0) - m * measure).abs() <= 5 * 0.5 / DRAWS**0.5).all()
    for t, width in enumerate(capacities(measure, m), 1):
        assert (degrees >= t).sum(-1).max() <= width
    assert (degrees.diff(dim=-1) <= 0).all()


def test_a_measure_is_geometric_or_poisson_and_starts_where_asked():
    geometric, poisson = degree_measure(30, 0, None), degree_measure(30, 0, 1.5)
    for n in range(8):
        assert geometric[n].item() == pytest.approx(2.0 ** -(n + 1), rel=1e-8)
        assert poisson[n].item() == pytest.approx(math.exp(-2.25) * 2.25**n / math.factorial(n), rel=1e-8)
    later = degree_measure(30, 2, None)
    assert later[:2].tolist() == [0, 0]
    torch.testing.assert_close(later[2:], geometric[2:] * 4, rtol=1e-8, atol=0)


@pytest.mark.parametrize("radius", [None, 1.0])
@pytest.mark.parametrize("num_features", [1, 7, 16])
def test_mean_and_variance_over_draws_are_those_of_the_formulas(num_features, radius):
    """One feature is one independent degree; more are systematic. Aligned, opposite and generic pairs."""
    x, y = vectors(4, 0.9, seed=1), vectors(4, 0.8, seed=2)
    y[0], y[1] = x[0], -x[1]
    measure = degree_measure(16, 0, radius)
    found = estimates(x, y, measure, num_features)
    exact = (x * y).sum(-1).exp()
    assert ((found.mean(0) - exact).abs() <= 4.5 * found.std(0) / DRAWS**0.5).all()
    squares = (found - exact).square()
    variance = estimate_variance(x, y, measure, num_features)
    assert ((squares.mean(0) - variance).abs() <= 5 * squares.std(0) / DRAWS**0.5).all()
    assert (variance <= estimate_variance(x, y, measure, num_features, systematic=False) + 1e-12).all()


def test_a_factor_has_the_second_moment_of_the_formula():
    x, y = vectors(3, 1.2, seed=3), vectors(3, 0.7, seed=4)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 5)
    moment = ((x @ signs.T) * (y @ signs.T)).square().mean(-1)
    torch.testing.assert_close(factor_moment(x, y), moment)
    assert (moment <= 3 * x.square().sum(-1) * y.square().sum(-1)).all()


def test_poisson_degrees_have_the_least_second_moment_and_that_is_its_value():
    """sum_N S^N/(P N!^2): e^{2 sqrt S} for the best P, 2 I_0(2 sqrt(2 S)) for the geometric, more at wrong radii."""
    x, y = vectors(1, 1.6, dim=64, seed=1), vectors(1, 1.4, dim=64, seed=2)
    root = factor_moment(x, y).sqrt()
    inner = (x * y).sum(-1)

    def second(radius):
        measure = degree_measure(40, 0, radius)
        return (estimate_variance(x, y, measure, 1) + inner.exp().square()).item()

    best = second(root.item() ** 0.5)
    assert best == pytest.approx(math.exp(2 * root.item()), rel=1e-6)
    argument = torch.special.i0(2 * 2**0.5 * root).item()
    assert second(None) == pytest.approx(2 * argument, rel=1e-4)
    assert best < min(second(None), second(1.3), second(1.8))


def test_truncation_leaves_out_the_tail_of_a_poisson_variable():
    """At degree 3 the mean is 1 + z + z^2/2 + z^3/6."""
    x = vectors(1, 1.1, seed=5)
    found = estimates(x, x, degree_measure(3, 0, None), 16)[:, 0]
    z = 1.1**2
    expected = 1 + z + z**2 / 2 + z**3 / 6
    assert abs(found.mean().item() - expected) < 5 * found.std().item() / DRAWS**0.5
    assert expected < math.exp(z) - 5 * found.std().item() / DRAWS**0.5
