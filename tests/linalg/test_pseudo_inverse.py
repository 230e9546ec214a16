"""Ridge and Newton-Schulz against their definitions in numpy and their theory."""

import numpy as np
import pytest
import torch

from attnlens.linalg.pseudo_inverse import NewtonSchulz, Ridge, newton_schulz, norm_bound, penrose_residual


def softmax_matrices(size=20, batch=(3, 2), sharpness=3.0):
    generator = torch.Generator().manual_seed(size)
    return torch.softmax(sharpness * torch.randn(*batch, size, size, generator=generator, dtype=torch.float64), -1)


def right_side(c, columns=4):
    shape = (*c.shape[:-1], columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_ridge_solves_the_penalized_least_squares_problem():
    c = softmax_matrices()
    y = right_side(c)
    found = Ridge(1e-2)(c, y)
    for index in np.ndindex(3, 2):
        a, b = c[index].numpy(), y[index].numpy()
        shift = 1e-2 * np.linalg.norm(a, 1) * np.linalg.norm(a, np.inf)
        stacked = np.concatenate([a, np.sqrt(shift) * np.eye(20)])
        expected = np.linalg.lstsq(stacked, np.concatenate([b, np.zeros((20, 4))]), rcond=None)[0]
        np.testing.assert_allclose(found[index].numpy(), expected, atol=1e-10)


def test_ridge_tends_to_the_inverse_and_is_it_at_zero():
    c = softmax_matrices(sharpness=5.0)
    y = right_side(c)
    exact = torch.linalg.solve(c, y)
    torch.testing.assert_close(Ridge(0.0)(c, y), exact)
    errors = [(Ridge(ridge)(c, y) - exact).norm().item() for ridge in (1e-4, 1e-6, 1e-8)]
    assert errors[0] > errors[1] > errors[2]


def test_norm_bound_is_above_the_squared_norm_of_every_matrix():
    c = softmax_matrices()
    assert (norm_bound(c)[..., 0, 0] >= torch.linalg.matrix_norm(c, 2).square()).all()


def test_iteration_follows_the_scalar_map_of_its_error():
    """In singular values, 1 - s z goes from e to (3 e^3 + e^4) / 4 at every step."""
    c = softmax_matrices(size=6)
    error = 1 - torch.linalg.svdvals(c).square() / norm_bound(c)[..., 0]
    for steps in range(1, 5):
        error = (3 * error**3 + error**4) / 4
        z = newton_schulz(c, steps)
        found = torch.linalg.eigvals(torch.eye(6, dtype=torch.float64) - c @ z).real.sort(-1).values
        torch.testing.assert_close(found, error.sort(-1).values, atol=1e-9, rtol=0)


def test_residual_falls_to_round_off_and_six_steps_are_not_enough():
    c = softmax_matrices(size=32)
    residuals = [penrose_residual(c, newton_schulz(c, steps)).max().item() for steps in (1, 6, 12, 30)]
    assert residuals[0] > residuals[1] > residuals[2] > residuals[3]
    assert residuals[1] > 1e-3
    assert residuals[3] < 1e-9


def test_iteration_tends_to_the_pseudo_inverse_of_a_singular_matrix():
    """Rank-deficient on purpose: a plain inverse does not exist."""
    c = softmax_matrices(size=8)
    c = torch.cat([c[..., :4, :], c[..., :4, :]], -2)
    found, exact = newton_schulz(c, 12), torch.linalg.pinv(c)
    assert (found - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("inverse", [Ridge(1e-3), Ridge(0.0), NewtonSchulz(6)])
def test_a_matrix_does_not_feel_its_neighbors(inverse):
    """A start from the batch-wide norms moved an unchanged example by 80 % in a peer."""
    c = softmax_matrices()
    y = right_side(c)
    louder = torch.cat([c[:1], 30 * c[1:]])
    torch.testing.assert_close(inverse(louder, y)[0], inverse(c, y)[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("inverse", [Ridge(1e-3), Ridge(0.0), NewtonSchulz(3)])
def test_gradients_agree_with_finite_differences(inverse):
    # Equal row sums would put |C|_inf at a kink, which no softmax matrix can leave.
    c = (softmax_matrices(size=4, batch=(2,)) * torch.tensor([[1.0], [0.9], [0.8], [0.7]])).requires_grad_()
    y = right_side(c.detach(), 2).requires_grad_()
    assert torch.autograd.gradcheck(inverse, (c, y))


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="`ridge`"):
        Ridge(-1.0)
    with pytest.raises(ValueError, match="`iterations`"):
        NewtonSchulz(0)
