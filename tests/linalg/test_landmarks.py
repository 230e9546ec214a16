"""Segments partition the real tokens evenly, whatever the padding, and their means are means."""

import pytest
import torch

from attnlens.linalg.landmarks import segment, segment_means


@pytest.mark.parametrize(("length", "num_landmarks"), [(1, 1), (5, 2), (5, 9), (64, 16), (70, 16), (17, 16), (7, 7)])
def test_segments_are_consecutive_even_and_cover_everything(length, num_landmarks):
    positions, member, equal = segment(length, num_landmarks, None, torch.device("cpu"))
    assert equal == (length % num_landmarks == 0)
    sizes = member.sum(-1)[0]
    assert sizes.shape[0] == min(length, num_landmarks)
    assert sizes.max() - sizes.min() <= 1
    assert positions[member].tolist() == list(range(length))


@pytest.mark.parametrize("num_landmarks", [1, 3, 4, 8])
def test_means_equal_a_loop_over_each_example_and_do_not_see_padding(num_landmarks):
    """Padding anywhere, left, right or between, of any amount, with NaN in it."""
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(4, 12, generator=generator) < 0.6
    real[0], real[1, :5], real[2], real[3] = True, False, torch.arange(12) < 3, False
    x = torch.randn(4, 2, 12, 3, generator=generator, dtype=torch.float64)
    x = torch.where(real[:, None, :, None], x, 0)
    means = segment_means(x, segment(12, num_landmarks, real, x.device))
    for example in range(4):
        tokens = x[example][:, real[example]]
        n = tokens.shape[1]
        filled = min(num_landmarks, n)
        for s in range(num_landmarks):
            part = tokens[:, s * n // max(filled, 1) : (s + 1) * n // max(filled, 1)]
            expected = part.mean(1) if s < filled else torch.zeros(2, 3, dtype=torch.float64)
            torch.testing.assert_close(means[example, :, s], expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("length", "num_landmarks"), [(64, 16), (70, 16), (7, 7), (12, 1), (5, 9)])
def test_without_a_mask_they_are_those_of_a_mask_of_ones(length, num_landmarks):
    x = torch.randn(2, 2, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, length, dtype=torch.bool)
    found, expected = (segment_means(x, segment(length, num_landmarks, mask, x.device)) for mask in (None, real))
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)


def test_gradient_of_the_means():
    real = torch.tensor([[True, True, False, True, True, True], [True, False, True, True, False, False]])
    x = torch.randn(2, 1, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: segment_means(x, segment(6, 2, real, x.device)), x)
