"""Count sketches of tensor powers: scikit-learn's on the same hashes, the explicit tensor, first and second moments."""

import itertools

import pytest
import torch
from sklearn.kernel_approximation import PolynomialCountSketch

from attnlens.linalg.count_sketch import count_sketches, draw_hashes, tensor_sketch

DRAWS = 20000


def vectors(count, dim, seed=0):
    return torch.randn(1, 1, count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimates(x, y, degree, num_features, draws=DRAWS):
    """<phi(x), phi(y)> over draws, one a head."""
    hashes = draw_hashes(draws, degree, x.shape[-1], num_features, torch.Generator().manual_seed(5))
    phi = [tensor_sketch(z.expand(1, draws, -1, -1), *hashes, num_features) for z in (x, y)]
    return (phi[0] * phi[1]).sum(-1)[0]


@pytest.mark.parametrize(("degree", "constant"), [(1, 0.0), (2, 0.0), (3, 0.7), (4, 2.0)])
def test_equals_scikit_learn_with_the_same_hashes(degree, constant):
    x = vectors(7, 5)
    oracle = PolynomialCountSketch(degree=degree, coef0=constant, n_components=11, random_state=3).fit(x[0, 0].numpy())
    buckets = torch.from_numpy(oracle.indexHash_)[None].long()
    signs = torch.from_numpy(oracle.bitHash_)[None].double()
    augmented = torch.cat([x, torch.full_like(x[..., :1], constant**0.5)], -1) if constant else x
    found = tensor_sketch(augmented, buckets, signs, 11)[0, 0]
    torch.testing.assert_close(found, torch.from_numpy(oracle.transform(x[0, 0].numpy())), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("num_features", [5, 8])
def test_is_the_count_sketch_of_the_tensor_power(num_features):
    """Bucket h_1(i_1) + h_2(i_2) + h_3(i_3) mod r, term by term."""
    x, degree, dim = vectors(3, 4), 3, 4
    buckets, signs = draw_hashes(1, degree, dim, num_features, torch.Generator().manual_seed(0))
    naive = torch.zeros(3, num_features, dtype=torch.float64)
    for index in itertools.product(range(dim), repeat=degree):
        position = sum(int(buckets[0, t, i]) for t, i in enumerate(index)) % num_features
        sign = torch.stack([signs[0, t, i] for t, i in enumerate(index)]).prod()
        naive[:, position] += sign * x[0, 0][:, list(index)].prod(-1)
    torch.testing.assert_close(tensor_sketch(x, buckets, signs, num_features)[0, 0], naive, atol=1e-12, rtol=1e-10)


def test_one_count_sketch_is_unbiased_with_the_variance_of_the_formula():
    x, y, r = vectors(6, 5, 1), vectors(6, 5, 2), 7
    hashes = draw_hashes(DRAWS, 1, 5, r, torch.Generator().manual_seed(4))
    sketched = [count_sketches(z.expand(1, DRAWS, -1, -1), *hashes, r)[0, :, 0] for z in (x, y)]
    found = (sketched[0] * sketched[1]).sum(-1)
    x, y = x[0, 0], y[0, 0]
    inner, squares = (x * y).sum(-1), (x.square() * y.square()).sum(-1)
    variance = (x.square().sum(-1) * y.square().sum(-1) - squares + inner.square() - squares) / r
    assert ((found.mean(0) - inner).abs() <= 5 * (variance / DRAWS).sqrt()).all()
    torch.testing.assert_close(found.var(0), variance, atol=0, rtol=0.06)
    assert (variance <= 2 * x.square().sum(-1) * y.square().sum(-1) / r).all()


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_powers_are_unbiased_within_the_bound_of_the_variance(degree):
    """Var <= (3^p - 1)/r |x|^{2p} |y|^{2p}; aligned, orthogonal and generic pairs."""
    x = torch.nn.functional.normalize(vectors(4, 4, 1), dim=-1)
    y = torch.nn.functional.normalize(vectors(4, 4, 2), dim=-1)
    y[:, :, 0] = x[:, :, 0]
    y[:, :, 1] = torch.stack([-x[0, 0, 1, 1], x[0, 0, 1, 0], -x[0, 0, 1, 3], x[0, 0, 1, 2]])
    found = estimates(x, y, degree, 16)
    exact = (x * y).sum(-1)[0, 0] ** degree
    assert ((found.mean(0) - exact).abs() <= 5 * found.std(0) / DRAWS**0.5).all()
    assert (found.var(0) <= (3**degree - 1) / 16).all()


def test_the_error_of_the_kernel_falls_like_the_square_root_of_the_features():
    x, y = vectors(8, 6, 1), vectors(8, 6, 2)
    exact = (x * y).sum(-1)[0, 0] ** 4
    error = [(estimates(x, y, 4, r, 2000) - exact).square().mean().sqrt().item() for r in (16, 64, 256)]
    slopes = [torch.tensor(a / b).log2().item() / 2 for a, b in itertools.pairwise(error)]
    assert all(0.4 < slope < 0.6 for slope in slopes), slopes
