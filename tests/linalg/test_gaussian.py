"""The streamed Gaussian kernel against its definition, forward and backward, and where round-off would show."""

import pytest
import torch

from attnlens.linalg.gaussian import gaussian_core, gaussian_naive, gaussian_product, nystrom_residual


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m", "width"), [(1, 1, 3), (7, 12, 5), (12, 7, 20)])
def test_streamed_product_equals_the_matrix_forward_and_backward(n, m, width):
    x, y, v = draw(2, 2, n, 4).requires_grad_(), draw(2, 2, m, 4, seed=1).requires_grad_(), draw(2, 2, m, width, seed=2)
    v.requires_grad_()
    mask = torch.arange(m) < torch.tensor([m, max(1, m // 2)])[:, None]
    found = gaussian_product(x, y, v, 0.7, key_padding_mask=mask)
    expected = (gaussian_naive(x, y, 0.7) * mask[:, None, None]) @ v
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    cotangent = draw(*found.shape, seed=3)
    pairs = zip(*(torch.autograd.grad((z * cotangent).sum(), (x, y, v)) for z in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


def test_far_points_underflow_to_zero_and_near_ones_do_not_overflow():
    x = 1e3 * draw(1, 1, 5, 4).float()
    out = gaussian_product(x, -x, torch.ones(1, 1, 5, 1), 0.5)
    assert (out == 0).all()
    same = gaussian_product(x, x, torch.eye(5).expand(1, 1, 5, 5), 0.5)
    assert same.isfinite().all()


def test_core_is_one_between_equal_rows_and_positive_semidefinite():
    """|x|^2 from a reduction and <x, x> from a matrix product differ in the last bit: exp(+) > 1 between equal rows."""
    x = 30 * draw(2, 6, 5).float().repeat(1, 3, 1)
    core = gaussian_core(x, 1.0)
    assert (core <= 1).all()
    assert (core.diagonal(dim1=-2, dim2=-1) == 1).all()
    assert (core[:, 0, 6] == 1).all()
    y = draw(3, 20, 4)
    torch.testing.assert_close(gaussian_core(y, 0.3), gaussian_naive(y, y, 0.3), atol=1e-13, rtol=1e-12)
    assert torch.linalg.eigvalsh(gaussian_core(y, 0.3)).min() > -1e-13


def test_definition_is_the_definition():
    x, y = draw(2, 3, 4), draw(2, 5, 4, seed=1)
    expected = (-0.35 * (x[:, :, None] - y[:, None]).square().sum(-1)).exp()
    torch.testing.assert_close(gaussian_naive(x, y, 0.7), expected, atol=1e-14, rtol=1e-13)


def test_residual_is_the_diagonal_of_what_the_landmarks_miss():
    x, landmarks = draw(1, 2, 9, 4), draw(1, 2, 5, 4, seed=1)
    filled = torch.tensor([True, True, True, True, False])
    core, cross = gaussian_core(landmarks[:, :, :4], 0.4), gaussian_naive(x, landmarks[:, :, :4], 0.4)
    expected = 1 - (cross @ torch.linalg.inv(core) @ cross.mT).diagonal(dim1=-2, dim2=-1)
    padded = torch.eye(5, dtype=x.dtype).repeat(1, 2, 1, 1)
    padded[:, :, :4, :4] = core
    found = nystrom_residual(x, landmarks, torch.linalg.cholesky(padded), filled.expand(1, 1, 5), 0.4)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-11)
    at_landmarks = nystrom_residual(
        landmarks[:, :, :4], landmarks, torch.linalg.cholesky(padded), filled[None, None], 0.4
    )
    assert at_landmarks.max() < 1e-13
