"""Hybrid features: the mixture written out, mean and variance over draws, exact pairs, and what the mixture gains."""

import math

import pytest
import torch

from attnlens.linalg.angular_hybrid import angle_share, hybrid_features, hybrid_variance, plane_sides

DRAWS = 200000


def pair(angle, radii=(0.9, 0.7), dim=4):
    """x and y at this angle in a random plane."""
    generator = torch.Generator().manual_seed(2)
    axes = torch.linalg.qr(torch.randn(dim, 2, generator=generator, dtype=torch.float64))[0].T
    return radii[0] * axes[0], radii[1] * (math.cos(angle) * axes[0] + math.sin(angle) * axes[1])


def draws(m, k, dim=4, heads=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, count, dim, generator=generator, dtype=torch.float64) for count in (m, k)]


def estimates(x, y, m, k, heads):
    parts = draws(m, k, len(x), heads)
    (f_x, scale_x), (f_y, scale_y) = (
        hybrid_features(z.expand(1, heads, 1, -1), *parts, keys=keys) for z, keys in ((x, False), (y, True))
    )
    return ((f_x * f_y).sum(-1) * (scale_x + scale_y).exp())[0, :, 0]


def test_the_inner_product_is_the_mixture_of_both_estimates():
    x, y = pair(1.1)
    w, u = (z[0, 0] for z in draws(6, 3))
    share = 0.5 - (torch.sign(u @ x) * torch.sign(u @ y)).mean() / 2
    half = (x.square().sum() + y.square().sum()) / 2
    positive = (w @ (x + y) - half).exp().mean()
    trigonometric = (w @ (x - y)).cos().mean() * half.exp()
    expected = share * positive + (1 - share) * trigonometric
    assert 0 < share < 1
    torch.testing.assert_close(estimates(x, y, 6, 3, 1)[0], expected)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("angle", [0.3, 1.6, 2.9])
def test_mean_and_variance_over_draws_are_those_of_the_formula(angle, k):
    x, y = pair(angle)
    found, exact = estimates(x, y, 2, k, DRAWS), (x * y).sum().exp()
    assert (found.mean() - exact).abs() < 4 * found.std() / DRAWS**0.5
    squares = (found - exact).square()
    assert (squares.mean() - hybrid_variance(x, y, 2, k)).abs() < 4.5 * squares.std() / DRAWS**0.5


def test_shared_frequencies_are_better_than_separate_ones_by_what_the_formula_says():
    """At k = 1 the estimates are never mixed and it makes no difference; with |x| = |y| the covariance vanishes."""
    x, y = pair(1.6, (1.3, 0.4))
    for k, gains in ((1, False), (4, True), (math.inf, True)):
        shared, separate = (hybrid_variance(x, y, 1, k, shared=flag).item() for flag in (True, False))
        assert shared < separate if gains else shared == pytest.approx(separate, rel=1e-12)
    x, y = pair(1.6, (0.8, 0.8))
    assert hybrid_variance(x, y, 1, 4).item() == pytest.approx(hybrid_variance(x, y, 1, 4, shared=False).item())


@pytest.mark.parametrize("sign", [1, -1])
def test_equal_and_opposite_pairs_are_exact(sign):
    x = pair(0.0)[0]
    found = estimates(x, sign * x, 1, 2, 100)
    torch.testing.assert_close(found, (sign * x.square().sum()).exp().expand(100), atol=1e-12, rtol=1e-10)
    assert hybrid_variance(x, sign * x, 1, 2).abs() < 1e-12


def test_the_share_of_separating_planes_is_the_angle_on_average():
    for angle in (0.2, 1.0, 2.5):
        x, y = pair(angle)
        share = angle_share(x, y)
        assert share.item() == pytest.approx(angle / math.pi, rel=1e-12)
        sides = [plane_sides(z[None], draws(1, DRAWS)[1][0, 0])[0] for z in (x, y)]
        found = 1 - (sides[0] * sides[1]).sum().item()
        assert abs(found - angle / math.pi) < 4 * (share * (1 - share) / DRAWS).sqrt().item()
    assert angle_share(*pair(1e-9)).item() == pytest.approx(1e-9 / math.pi, rel=1e-6)


def test_the_largest_relative_variance_over_angles_is_below_that_of_either_estimate():
    angles = torch.linspace(0.01, math.pi - 0.01, 200).tolist()
    radius = 1.5
    worst = {}
    for k in (1, math.inf):
        relative = [
            hybrid_variance(x, y, 1, k) / (2 * (x * y).sum()).exp() for x, y in (pair(a, (radius,) * 2) for a in angles)
        ]
        worst[k] = max(relative).item()
    of_positive = math.expm1(4 * radius**2)
    of_trigonometric = math.exp(4 * radius**2) * (1 - math.exp(-4 * radius**2)) ** 2 / 2
    assert worst[math.inf] < worst[1] < 0.5 * min(of_positive, of_trigonometric)


def test_signs_have_no_gradient_and_scales_cancel():
    x, y = (z[None, None, None].clone().requires_grad_() for z in pair(1.1))
    parts = draws(5, 2)

    def kernel(x, y):
        (f_x, scale_x), (f_y, scale_y) = hybrid_features(x, *parts, keys=False), hybrid_features(y, *parts, keys=True)
        return (f_x * f_y).sum(-1) * (scale_x + scale_y).exp()

    assert torch.autograd.gradcheck(lambda x, y: kernel(x, y) * 1.0, (x, y))
