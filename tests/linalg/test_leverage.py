"""Leverage scores against an orthonormal basis, their sum against the rank, their variational meaning."""

import pytest
import torch

from attnlens.linalg.leverage import RIDGE, leverage_scores


def matrix(n, d, seed=0):
    return torch.randn(2, 3, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(40, 5), (7, 7), (4, 9)])
def test_squared_rows_of_an_orthonormal_basis(shape):
    """Below them by lambda / (sigma^2 + lambda) at most, sigma the smallest singular value."""
    x = matrix(*shape)
    u, singular, _ = torch.linalg.svd(x, full_matrices=False)
    gap = u.square().sum(-1) - leverage_scores(x)
    ridge = RIDGE * x.square().sum((-2, -1))
    assert (gap > -1e-9).all()
    assert (gap <= (ridge / singular[..., -1] ** 2)[..., None] + 1e-9).all()


def test_the_sum_is_the_rank_where_columns_depend_on_each_other():
    """A QR factorization of these 6 columns of rank 3 has 6 orthonormal columns, half of them arbitrary."""
    x = matrix(30, 3) @ matrix(3, 6, seed=1)
    scores = leverage_scores(x)
    torch.testing.assert_close(scores.sum(-1), torch.full((2, 3), 3.0, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.linalg.qr(x).Q.square().sum((-1, -2)).min() > 5.9


def test_no_query_gives_a_key_a_larger_share_of_squares_and_one_attains_it():
    x = matrix(20, 4)
    scores = leverage_scores(x)
    y = torch.randn(2, 3, 4, 500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    share = (x @ y).square()
    share = share / share.sum(2, keepdim=True)
    assert (share <= scores[..., None] + 1e-9).all()
    best = torch.linalg.solve(x.mT @ x, x.mT)
    attained = (x @ best).square()
    attained = (attained / attained.sum(2, keepdim=True)).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(attained, scores, atol=1e-7, rtol=0)


def test_scale_padding_and_zeros():
    x = matrix(20, 4)
    scores = leverage_scores(x)
    torch.testing.assert_close(leverage_scores(1e-6 * x), scores, atol=1e-9, rtol=0)
    padded = torch.cat([x, torch.zeros_like(x[:, :, :5])], 2)
    torch.testing.assert_close(leverage_scores(padded)[..., :20], scores, atol=1e-12, rtol=0)
    assert (leverage_scores(0 * x) == 0).all()
