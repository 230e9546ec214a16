"""The kernel density identity against its definition, column norms against the matrix, the theorem by Monte Carlo."""

import math

import pytest
import torch

from attnlens.linalg.dense import softmax_weights
from attnlens.linalg.kernel_density import (
    bernstein_bound,
    column_probability,
    lifted_points,
    log_column_squares,
    log_kernel_sum,
    log_kernel_sum_by_density,
    log_row_sums,
    sampled_product,
)
from attnlens.testing.inputs import EXACT, gaussian


def weights_of(shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01


def test_a_weighted_sum_of_exponentials_is_a_gaussian_density():
    q, k, _ = gaussian(17)
    x = weights_of(k.shape[:3])
    expected = (x[:, :, None] * (q @ k.mT).exp()).sum(-1).log()
    assert torch.allclose(log_kernel_sum(q, k, x.log()), expected, atol=EXACT)
    assert torch.allclose(log_kernel_sum_by_density(q, k, x.log()), expected, atol=EXACT)


def test_the_identity_as_the_survey_prints_it_is_off_by_the_norm_of_the_query():
    """Without e^{|q|^2/2} the density gives another number, even with the right points."""
    q, k, _ = gaussian(17)
    x = weights_of(k.shape[:3])
    missing = log_kernel_sum_by_density(q, k, x.log()) - q.square().sum(-1) / 2
    gap = log_kernel_sum(q, k, x.log()) - missing
    assert torch.allclose(gap, q.square().sum(-1) / 2, atol=EXACT)
    assert gap.min() > 0.1


def test_lifted_points_solve_their_equation():
    _, k, _ = gaussian(9)
    x = weights_of(k.shape[:3])
    points, log_total = lifted_points(k, x.log())
    left = x.log() + points.square().sum(-1) / 2
    assert torch.allclose(left, log_total[..., None].expand_as(left), atol=EXACT)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_row_sums_and_column_norms_are_those_of_the_matrix(scale):
    """Column norms, as the sampling needs: row norms, which the survey names, are another vector."""
    q, k, _ = gaussian(20, logit_scale=scale)
    log_z = log_row_sums(q, k)
    assert torch.allclose(log_z, (q @ k.mT * 8**-0.5).logsumexp(-1), atol=EXACT)
    weights = softmax_weights(q, k)
    columns = log_column_squares(q, k, log_z).exp()
    assert torch.allclose(columns, weights.square().sum(2), atol=EXACT)
    assert (columns - weights.square().sum(3)).abs().max() > 1e-3


def test_no_overflow_in_float32_where_exponentials_have_left_its_range():
    q, k, v = (x.float() for x in gaussian(30, logit_scale=100.0))
    log_z = log_row_sums(q, k)
    assert log_z.max() > 89
    p = column_probability(log_column_squares(q, k, log_z), v)
    assert torch.allclose(p.sum(-1), torch.ones(2, 2))
    assert torch.isfinite(sampled_product(q, k, v, log_z, p, torch.rand(2, 2, 8))).all()


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_sampled_product_is_unbiased_and_obeys_the_theorem(scale):
    """400 draws in the batch: the mean within five standard errors, the mean spectral error below the bound."""
    draws, n = 400, 32
    q, k, v = (x[:1, :1].expand(draws, 1, -1, -1) for x in gaussian(n, logit_scale=scale))
    log_z = log_row_sums(q, k)
    p = column_probability(log_column_squares(q, k, log_z), v)
    exact = softmax_weights(q[:1], k[:1]) @ v[:1]
    errors = []
    for m in (4, 16, 64, 256):
        uniform = torch.rand(draws, 1, m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
        estimate = sampled_product(q, k, v, log_z, p, uniform)
        bias = (estimate.mean(0) - exact[0]).abs()
        assert (bias <= 5 * estimate.std(0) / draws**0.5).all()
        mean_error = torch.linalg.matrix_norm(estimate - exact, 2).mean()
        bound = bernstein_bound(softmax_weights(q[0, 0][None, None], k[0, 0][None, None]), v[:1], m)
        assert mean_error <= bound.squeeze()
        errors.append(mean_error.item())
    slope = math.log(errors[-1] / errors[0]) / math.log(64)
    assert abs(slope + 0.5) < 0.1


def test_row_sums_off_by_a_factor_move_the_estimate_by_that_factor():
    """What a density estimate with error eps costs beyond the sampling."""
    q, k, v = gaussian(16)
    log_z = log_row_sums(q, k)
    p = column_probability(log_column_squares(q, k, log_z), v)
    uniform = torch.rand(2, 2, 8, dtype=torch.float64)
    eps = (torch.rand(2, 2, 16, dtype=torch.float64) - 0.5) / 5
    off = sampled_product(q, k, v, log_z + (1 + eps).log(), p, uniform)
    right = sampled_product(q, k, v, log_z, p, uniform)
    assert torch.allclose(off * (1 + eps)[..., None], right, atol=EXACT)
