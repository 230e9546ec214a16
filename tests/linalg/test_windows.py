"""Overlapping windows: a view of every stretch, and gradients that add up where stretches overlap."""

import pytest
import torch

from attnlens.linalg.windows import windows
from attnlens.testing.inputs import gaussian


@pytest.mark.parametrize(("length", "width", "step"), [(12, 4, 4), (13, 5, 2), (13, 6, 3), (9, 9, 4), (20, 3, 7)])
def test_windows_and_their_gradient_equal_slices(length, width, step):
    x = gaussian(length)[0].requires_grad_()
    found = windows(x, width, step)
    expected = torch.stack([x[:, :, s : s + width] for s in range(0, length - width + 1, step)], 2)
    assert torch.equal(found, expected)
    direction = torch.randn_like(expected)
    pair = [torch.autograd.grad(out, x, direction)[0] for out in (found, expected)]
    assert torch.allclose(*pair, atol=1e-12)


def test_forward_copies_nothing():
    x = gaussian(16)[0]
    assert windows(x, 8, 2).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
