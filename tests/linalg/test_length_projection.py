"""Projections along the sequence: what each matrix is, and that only an example's own real tokens enter."""

import pytest
import torch

from attnlens.linalg.length_projection import JohnsonLindenstrauss, Learned, Pooled, segment_matrix
from attnlens.testing.inputs import HEADS, MAX_LENGTH, gaussian


def projections(num_keys, longest=MAX_LENGTH):
    found = [Pooled(), Learned(HEADS, longest), JohnsonLindenstrauss(HEADS, longest, seed=0)]
    for projection in found:
        projection.allocate(num_keys)
    return found


@pytest.mark.parametrize(("num_keys", "length"), [(1, 5), (4, 12), (5, 13), (7, 7), (9, 4)])
def test_segment_means_as_a_matrix(num_keys, length):
    matrix = segment_matrix(num_keys, length)
    assert matrix.shape == (min(num_keys, length), length)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[0]))
    assert (matrix.count_nonzero(0) == 1).all(), "every token in one segment"
    sizes = matrix.count_nonzero(-1)
    assert sizes.max() - sizes.min() <= 1


def test_learned_matrices_start_as_pooling_and_differ_by_head_and_by_role():
    pooled, learned, _ = projections(6, longest=20)
    _, k, v = gaussian(20, dtype=torch.float32)
    for a, b in zip(pooled(k, v, None)[:2], learned(k, v, None)[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert {name: tuple(x.shape) for name, x in learned.named_parameters()} == {
        "keys": (HEADS, 6, 20),
        "values": (HEADS, 6, 20),
    }
    with torch.no_grad():
        learned.values[1].zero_()
    keys, values, _ = learned(k, v, None)
    assert (values[:, 1] == 0).all()
    assert (values[:, 0] != 0).any()
    assert (keys[:, 1] != 0).any()


def test_padding_between_tokens_and_mixed_lengths_equal_the_short_runs():
    _, k, v = gaussian(40, batch=3, dtype=torch.float32)
    real = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    real[1], real[2] = torch.arange(40) >= 25, torch.arange(40) < 5
    zeroed = [torch.where(real[:, None, :, None], x, 0) for x in (k, v)]
    for projection in projections(8):
        keys, values, bias = projection(*zeroed, real)
        for example in range(3):
            few = slice(example, example + 1)
            short = projection(*(x[few][:, :, real[example]] for x in (k, v)), None)
            size = short[0].shape[2]
            torch.testing.assert_close(keys[few, :, :size], short[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(values[few, :, :size], short[1], atol=1e-5, rtol=0)
            if bias is not None:
                torch.testing.assert_close(bias[few, ..., :size], short[2])
                assert (bias[few, ..., size:] == -torch.inf).all()


def test_the_gaussian_draw_keeps_lengths_in_the_mean_and_is_a_buffer():
    draws = []
    for seed in range(300):
        projection = JohnsonLindenstrauss(HEADS, 20, seed)
        projection.allocate(5)
        draws.append(projection.matrix.double())
    x = torch.linspace(-1, 2, 20, dtype=torch.float64)
    squared = torch.stack([(m @ x).square().sum(-1) for m in draws]) / x.square().sum()
    standard_error = (2 / 5) ** 0.5 / (300 * HEADS) ** 0.5
    assert abs(squared.mean() - 1) < 5 * standard_error
    assert not torch.equal(draws[0][0], draws[0][1]), "heads share a draw"
    assert list(projection.state_dict()) == ["matrix"]


def test_a_length_beyond_the_matrix_names_the_remedy():
    _, k, v = gaussian(21, dtype=torch.float32)
    for projection in projections(4, longest=20)[1:]:
        with pytest.raises(ValueError, match="length 21 is beyond `max_length`=20"):
            projection(k, v, None)
