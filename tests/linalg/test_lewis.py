"""Lewis weights and bounds of sensitivities: fixed point, validity against the supremum, sizes, prefixes."""

import pytest
import torch

from attnlens.linalg.lewis import (
    CHUNK,
    inverse_forms,
    lewis_weights,
    online_sensitivity_bounds,
    sensitivity_bounds,
)


def keys(count, dim, seed=0, spread=0.0):
    """Gaussian rows, of very different lengths where `spread` is positive."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(1, 1, count, dim, generator=generator, dtype=torch.float64)
    return k * (spread * torch.randn(1, 1, count, 1, generator=generator, dtype=torch.float64)).exp()


def weighed(k, y, degree, sink=0.0):
    """|<k_j, y>|^p / (sink + sum_l |<k_l, y>|^p), a row of `y` each."""
    power = (y @ k.mT).abs() ** degree
    return power / (sink + power.sum(-1, keepdim=True))


def supremum(k, degree, steps=300):
    """alpha_j from below, for every j: ascent on y from the leverage direction of k_j."""
    y = torch.linalg.solve(k.mT @ k, k.mT).mT.clone().requires_grad_()
    optimizer = torch.optim.Adam([y], lr=0.03)
    best = torch.zeros(k.shape[0], dtype=k.dtype)
    for _ in range(steps):
        share = weighed(k, torch.nn.functional.normalize(y, dim=-1), degree).diagonal()
        best = best.maximum(share.detach())
        optimizer.zero_grad()
        (-share.log().sum()).backward()
        optimizer.step()
    return best


@pytest.mark.parametrize("degree", [2, 3, 4, 6, 8])
def test_the_contraction_reaches_lewis_weights(degree):
    """w_j = (k_j^T M^{-1} k_j)^{p/2} and sum w = d, to round-off."""
    k = keys(60, 3, spread=1.0)
    w = lewis_weights(k, degree, 0.0, 200)
    torch.testing.assert_close(inverse_forms(k, w ** (1 - 2 / degree), 0.0) ** (degree / 2), w, atol=1e-13, rtol=1e-9)
    torch.testing.assert_close(w.sum(), torch.tensor(3.0, dtype=torch.float64))


def test_the_form_of_the_fixed_point_does_not_converge_at_degree_four():
    """w <- (k_j^T M^{-1} k_j)^{p/2} has the factor p/2 - 1 in the logarithm: 1/2 at p = 3, 1 at p = 4."""
    k = keys(60, 3, spread=1.0)
    for degree, converges in ((3, True), (4, False)):
        w, target = torch.ones(1, 1, 60, dtype=torch.float64), lewis_weights(k, degree, 0.0, 200)
        for _ in range(200):
            w = inverse_forms(k, w ** (1 - 2 / degree), 0.0) ** (degree / 2)
        off = (w / target).log().abs().max().item()
        assert (off < 1e-9) == converges, (degree, off)
        assert converges or off > 0.5


def test_degree_two_is_the_leverage_score():
    k = keys(40, 5, spread=0.5)
    basis = torch.linalg.qr(k)[0]
    torch.testing.assert_close(sensitivity_bounds(k, 2, 0.0, 1), basis.square().sum(-1), atol=1e-12, rtol=1e-10)
    attained = supremum(k[0, 0], 2, steps=1)
    torch.testing.assert_close(attained, basis[0, 0].square().sum(-1), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("iterations", [1, 5, 40])
@pytest.mark.parametrize("degree", [2, 3, 4, 6.5])
def test_bounds_hold_for_the_supremum_however_few_the_iterations(degree, iterations):
    for seed, spread in ((0, 0.0), (1, 1.5)):
        k = keys(50, 3, seed, spread)
        bound = sensitivity_bounds(k, degree, 0.0, iterations)[0, 0]
        assert (supremum(k[0, 0], degree) <= bound * (1 + 1e-9)).all()


def test_lewis_weights_alone_are_no_bound_above_degree_two():
    """The factor d^{p/2-1} is needed: at p = 4 the sensitivity exceeds the weight in every row."""
    k = keys(60, 3)
    for degree in (3, 4, 8):
        assert (supremum(k[0, 0], degree) > lewis_weights(k, degree, 0.0, 60)[0, 0]).all()


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_at_most_a_power_of_the_dimension_over_eps_keys_whatever_the_length(degree):
    """Bounds sum to d^{p/2}, so that at most d^{p/2}/eps of them exceed eps: at 100 keys and at 3000."""
    for count in (100, 3000):
        bound = sensitivity_bounds(keys(count, 4, spread=2.0), degree, 0.0, 60)
        assert bound.sum() <= 4 ** (degree / 2) * (1 + 1e-6)
        for eps in (0.05, 0.5):
            assert (bound > eps).sum() <= 4 ** (degree / 2) / eps


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 10.0])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_a_ridge_bounds_the_weights_beside_a_one(degree, ridge):
    """|<k_j, y>|^p / (1 + sum) for every |y|^2 <= 1/ridge; the worst directions are those of the ridge scores."""
    k = keys(20, 4, spread=1.0)[0, 0]
    generator = torch.Generator().manual_seed(1)
    gram = k.mT @ k + ridge * torch.eye(4, dtype=k.dtype)
    y = torch.cat([torch.linalg.solve(gram, k.mT).mT, k, torch.randn(4000, 4, generator=generator, dtype=k.dtype)])
    y = torch.nn.functional.normalize(y, dim=-1) * ridge**-0.5
    bound = sensitivity_bounds(k[None, None], degree, ridge, 10)[0, 0]
    for length in (1.0, 0.5, 0.1):
        assert (weighed(k, length * y, degree, 1.0).amax(0) <= bound * (1 + 1e-9)).all()
    if degree == 2:
        torch.testing.assert_close(weighed(k, y[:20], 2, 1.0).diagonal(), bound, atol=1e-12, rtol=1e-9)


def test_online_scores_at_degree_two_are_those_of_every_prefix():
    ridge = 1e-3
    k = keys(2 * CHUNK + 9, 6, spread=1.0)
    expected = torch.stack(
        [
            inverse_forms(k[:, :, : j + 1], torch.ones(1, 1, j + 1, dtype=k.dtype), ridge)[..., -1]
            for j in range(k.shape[2])
        ]
    )
    torch.testing.assert_close(online_sensitivity_bounds(k, 2, ridge)[0, 0], expected[:, 0, 0], atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_online_bounds_hold_in_every_later_prefix_and_see_no_future(degree):
    ridge = 1e-3
    k = keys(CHUNK + 40, 4, spread=1.0)
    bound = online_sensitivity_bounds(k, degree, ridge)
    generator = torch.Generator().manual_seed(1)
    for length in (1, 3, 30, CHUNK, CHUNK + 1, CHUNK + 40):
        prefix = k[0, 0, :length]
        gram = prefix.mT @ prefix + ridge * torch.eye(4, dtype=k.dtype)
        y = torch.cat([torch.linalg.solve(gram, prefix.mT).mT, torch.randn(500, 4, generator=generator, dtype=k.dtype)])
        y = torch.nn.functional.normalize(y, dim=-1) * ridge**-0.5
        assert (weighed(prefix, y, degree, 1.0).amax(0) <= bound[0, 0, :length] * (1 + 1e-7)).all()
        again = online_sensitivity_bounds(torch.cat([k[:, :, :length], 100 * k[:, :, length:]], 2), degree, ridge)
        torch.testing.assert_close(again[..., :length], bound[..., :length], atol=1e-12, rtol=1e-9)
