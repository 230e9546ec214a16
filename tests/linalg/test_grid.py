"""Grids: cells in row-major order, fixed modes that are cut, what is real."""

import pytest
import torch

from attnlens.linalg.grid import fixed_modes, grid_shape, mode_product, real_cells, to_grid, to_sequence


@pytest.mark.parametrize(
    ("length", "fixed", "shape"),
    [
        (1, (8,), (1, 1)),
        (5, (8,), (1, 5)),
        (64, (8,), (8, 8)),
        (65, (8,), (9, 8)),
        (70, (4, 8), (3, 4, 8)),
        (9, (4, 8), (1, 2, 8)),
        (3, (4, 8), (1, 1, 3)),
    ],
)
def test_the_first_mode_grows_with_the_length(length, fixed, shape):
    assert grid_shape(length, fixed) == shape
    x = torch.arange(length, dtype=torch.float64)[None, None, :, None].expand(2, 3, -1, 2)
    grid = to_grid(x, shape)
    assert torch.equal(to_sequence(grid, length), x)
    real = real_cells(length, shape, None, x.device)
    cells = torch.arange(torch.Size(shape).numel()).view(shape)
    if real is None:
        assert cells.numel() == length
    else:
        assert torch.equal(real[0], cells < length)
    assert torch.equal(grid[0, 0, ..., 0], torch.where(cells < length, cells, 0).double())


def test_a_mask_is_laid_out_like_the_tokens():
    mask = torch.arange(10) < torch.tensor([10, 4])[:, None]
    real = real_cells(10, (3, 4), mask, mask.device)
    assert torch.equal(real.flatten(1)[:, :10], mask)
    assert not real.flatten(1)[:, 10:].any()


def test_mode_products_are_sums_along_one_mode():
    generator = torch.Generator().manual_seed(0)
    x, a = (torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64) for shape in ((4, 5, 6), (7, 5)))
    found = mode_product(x, a, 1)
    torch.testing.assert_close(found, torch.einsum("bhij,bhrjd->bhrid", a, x), atol=1e-12, rtol=0)


def test_sides_below_one_are_refused():
    assert fixed_modes(8, None) == (8,)
    assert fixed_modes(8, 4) == (4, 8)
    with pytest.raises(ValueError, match="`num_columns` must be at least 1, got 0"):
        fixed_modes(0, None)
    with pytest.raises(ValueError, match="`num_rows` must be at least 1, got 0"):
        fixed_modes(3, 0)
