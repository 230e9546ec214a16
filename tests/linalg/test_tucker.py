"""Tucker by successive truncation: its error exactly, its distance from the best, gradients of what it spans."""

import pytest
import torch
from torch.autograd import gradcheck

from attnlens.linalg.grid import mode_product
from attnlens.linalg.tucker import leading_directions, tucker


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unfold(x, mode):
    return x.movedim(2 + mode, 2).flatten(3)


def norm(x):
    return x.flatten(2).norm(dim=-1)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_the_squared_error_is_the_sum_of_what_each_mode_drops(rank):
    x = draw(2, 3, 5, 4, 6)
    left, dropped = x, torch.zeros(2, 3, dtype=torch.float64)
    for mode in (2, 1, 0):
        energy = torch.linalg.eigvalsh(unfold(left, mode) @ unfold(left, mode).mT).flip(-1)
        dropped = dropped + energy[..., rank:].sum(-1)
        basis = torch.linalg.svd(unfold(left, mode)).U[..., :rank]
        left = mode_product(left, basis @ basis.mT, mode)
    parts = tucker(x, rank)
    torch.testing.assert_close(parts.expand(3), left, atol=1e-10, rtol=0)
    torch.testing.assert_close(norm(x - parts.expand(3)).square(), dropped, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_it_is_near_the_best(rank):
    """No tensor of these ranks is nearer than what one mode alone must drop; all of them drop at most that, summed."""
    x = draw(2, 3, 5, 4, 6)
    error = norm(x - tucker(x, rank).expand(3))
    tails = [torch.linalg.svdvals(unfold(x, mode))[..., rank:].square().sum(-1) for mode in range(3)]
    assert (error.square() <= sum(tails) + 1e-12).all()
    assert (error.square() >= torch.stack(tails).amax(0) - 1e-12).all()


def test_a_tensor_of_these_ranks_is_met_and_modes_of_full_rank_are_left_alone():
    x = draw(2, 3, 2, 2, 2)
    for mode, side in enumerate((5, 4, 6)):
        x = mode_product(x, draw(2, 3, side, 2, seed=mode + 1), mode)
    torch.testing.assert_close(tucker(x, 2).expand(3), x, atol=1e-10, rtol=0)
    parts = tucker(x, 5)
    assert [factor is None for factor in parts.factors] == [True, True, False]
    assert tucker(x, 6).core is x


def test_factors_are_orthonormal_and_the_size_counts_core_and_factors():
    parts = tucker(draw(2, 3, 5, 4, 6), 3)
    for factor in parts.factors:
        torch.testing.assert_close(factor.mT @ factor, torch.eye(3).double().expand(2, 3, 3, 3), atol=1e-12, rtol=0)
    assert parts.core.shape == (2, 3, 3, 3, 3)
    assert parts.size() == 27 + 3 * (5 + 4 + 6)


def test_gradients_of_the_projector_and_of_the_decomposition():
    root = draw(2, 5, 7).requires_grad_()

    def projector(x):
        u = leading_directions(x @ x.mT, 2)
        return u @ u.mT

    assert gradcheck(projector, root)
    for rank in (1, 2, 3):
        assert gradcheck(lambda x, rank=rank: tucker(x, rank).expand(3), draw(1, 2, 4, 3, 5).requires_grad_())


def test_equal_eigenvalues_and_empty_slices_leave_gradients_finite():
    x = torch.zeros(1, 1, 4, 4, 3, dtype=torch.float64)
    x[..., :2, :2, 0] = torch.eye(2)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(tucker(x, 3).expand(3).square().sum(), x)
    assert grad.isfinite().all()
    (grad,) = torch.autograd.grad(tucker(x * 0, 1).expand(3).sum(), x)
    assert grad.isfinite().all()
