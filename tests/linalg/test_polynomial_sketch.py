"""The recursive sketch: node by node, unbiased with independent children only, and its exact variance."""

import pytest
import torch

from attnlens.linalg.polynomial_features import self_tensored
from attnlens.linalg.polynomial_sketch import draw_tree, recursive_sketch, relative_variance

DRAWS = 40000


def unit(count, dim, seed):
    x = torch.randn(1, 1, count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


def products(x, y, degree, r, draws=DRAWS):
    """<phi(x), phi(y)> over draws, one a head."""
    tree = [z.double() for z in draw_tree(draws, degree, x.shape[-1], r, torch.Generator().manual_seed(3))]
    phi = [recursive_sketch(z.expand(1, draws, -1, -1), *tree) for z in (x, y)]
    return (phi[0] * phi[1]).sum(-1)[0]


def naive(x, leaves, inner, first, last, level_start, r):
    """Node over the leaves first..last - 1, by the recursion as it is written."""
    if last - first == 2:
        return (x @ leaves[first]) * (x @ leaves[first + 1]) * r**-0.5
    middle = (first + last) // 2
    halves = [naive(x, leaves, inner, *ends, level_start, r) for ends in ((first, middle), (middle, last))]
    width = (last - first) // 2
    offset = level_start[width]
    return (halves[0] @ inner[offset + first // width]) * (halves[1] @ inner[offset + first // width + 1]) * r**-0.5


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_levels_in_one_product_equal_the_recursion(degree):
    x, r = unit(5, 4, 0)[0, 0], 6
    leaves, inner = (z.double() for z in draw_tree(1, degree, 4, r, torch.Generator().manual_seed(1)))
    # Nodes over 2 leaves come first, degree/2 of them, then those over 4.
    starts = {2: 0, 4: degree // 2}
    expected = naive(x, leaves[0], inner[0], 0, degree, starts, r)
    torch.testing.assert_close(recursive_sketch(x[None, None], leaves, inner)[0, 0], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("degree", [2, 4])
def test_independent_children_are_unbiased_with_the_proved_variance(degree):
    x, y, r = unit(4, 3, 1), unit(4, 3, 2), 16
    y[:, :, 0] = x[:, :, 0]
    found = products(x, y, degree, r)
    exact = (x * y).sum(-1)[0, 0] ** degree
    assert ((found.mean(0) - exact).abs() <= 5 * found.std(0) / DRAWS**0.5).all()
    assert (found.var(0)[1:] <= relative_variance(degree, r)).all()
    torch.testing.assert_close(found.var(0)[0].item(), relative_variance(degree, r), atol=0, rtol=0.1)


def test_a_shared_child_is_biased():
    """The recursion as printed in the survey and in the paper's listing uses one phi_2 twice: phi_4 then estimates
    E <phi_2(x), phi_2(y)>^2 = <x, y>^4 + Var, several times <x, y>^4 for a pair of moderate angle."""
    x, y, r = unit(1, 8, 1), unit(1, 8, 4), 16
    y = torch.nn.functional.normalize(0.5 * x + y, dim=-1)
    generator = torch.Generator().manual_seed(3)
    leaves, none = (z.double() for z in draw_tree(DRAWS, 2, 8, r, generator))
    g = torch.randn(2, DRAWS, r, r, generator=generator, dtype=torch.float64)
    child = [recursive_sketch(z.expand(1, DRAWS, -1, -1), leaves, none) for z in (x, y)]
    shared = [(c @ g[0]) * (c @ g[1]) * r**-0.5 for c in child]
    biased = (shared[0] * shared[1]).sum(-1)[0, :, 0]
    exact = (x * y).sum().item() ** 4
    assert biased.mean() - exact > 10 * biased.std() / DRAWS**0.5
    assert biased.mean() > 1.5 * exact
    sound = products(x, y, 4, r)[:, 0]
    assert (sound.mean() - exact).abs() < 5 * sound.std() / DRAWS**0.5
    assert (sound < 0).any(), "unbiased, and therefore signed"


def test_self_tensoring_is_biased_upward_by_the_variance():
    """E <phi_2, phi_2>^2 - <x, y>^4 = (|x|^4 |y|^4 + 4 <x, y>^2 |x|^2 |y|^2 + 3 <x, y>^4)/r, for unit vectors here."""
    x, y, r = unit(6, 5, 1), unit(6, 5, 2), 32
    found = products(x, y, 2, r).square()
    inner = (x * y).sum(-1)[0, 0]
    expected = inner**4 + (1 + 4 * inner**2 + 3 * inner**4) / r
    assert ((found.mean(0) - expected).abs() <= 5 * found.std(0) / DRAWS**0.5).all()
    assert (found.mean(0) - inner**4 > 20 * found.std(0) / DRAWS**0.5).all()


def test_approximate_matrix_product_within_its_bound():
    """E |phi(Q) phi(K)^T - (Q K^T)^p|_F^2 <= ((1 + 8/r)^{p-1} - 1) |Q^p|_F^2 |K^p|_F^2, and within a factor of 4."""
    q, k = unit(12, 6, 1) * 1.3, unit(9, 6, 2)
    k = torch.cat([k, q[:, :, :3]], 2)
    for degree, r in ((2, 8), (4, 32)):
        tree = [z.double() for z in draw_tree(4000, degree, 6, r, torch.Generator().manual_seed(0))]
        phi = [recursive_sketch(z.expand(1, 4000, -1, -1), *tree)[0] for z in (q, k)]
        error = (phi[0] @ phi[1].mT - (q @ k.mT)[0] ** degree).square().sum((-2, -1)).mean()
        scale = (q.square().sum(-1) ** degree).sum() * (k.square().sum(-1) ** degree).sum()
        share = error / (relative_variance(degree, r) * scale)
        assert 0.1 < share <= 1, share


def test_self_tensored_features_give_squares():
    phi = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = self_tensored(phi)
    assert features.shape[-1] == 7 * 8 // 2
    torch.testing.assert_close(features @ features.mT, (phi @ phi.mT).square(), atol=1e-12, rtol=1e-12)
