"""The truncated SVD: Eckart-Young on P, what it does not say about outputs, and the gradient of the truncation."""

import pytest
import torch
from torch.autograd import gradcheck

from attnlens.analysis.flops import count_flops
from attnlens.attention.nystromformer import Nystromformer
from attnlens.attention.softmax import softmax_naive, softmax_weights
from attnlens.attention.svd import TruncatedSVD, real_weights, truncate
from attnlens.linalg.pseudo_inverse import Ridge
from attnlens.testing.inputs import gaussian


def frobenius(x):
    return torch.linalg.matrix_norm(x)


def naive(q, k, v, rank):
    """Through the factors, whose own gradients torch has where all singular values are distinct."""
    left, sigma, right = torch.linalg.svd(softmax_weights(q, k))
    return (left[..., :rank] * sigma[..., None, :rank]) @ (right[..., :rank, :] @ v)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("rank", [1, 5, 19])
def test_eckart_young_on_the_matrix(rank, scale):
    """The error is the root of the squares of the singular values cut off, sigma_{r+1} in the spectral norm."""
    q, k, _ = gaussian(20, logit_scale=scale)
    exact, found = softmax_weights(q, k), TruncatedSVD(rank).matrix(q, k)
    sigma = torch.linalg.svdvals(exact)
    torch.testing.assert_close(frobenius(exact - found), sigma[..., rank:].square().sum(-1).sqrt(), atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.linalg.matrix_norm(exact - found, ord=2), sigma[..., rank], atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank", [2, 6, 12])
def test_no_other_matrix_of_that_rank_is_nearer(rank):
    """Nyström at as many landmarks, projections on random rows and columns, and small steps away from P_r."""
    q, k, _ = gaussian(24, logit_scale=2.0)
    exact, best = softmax_weights(q, k), TruncatedSVD(rank).matrix(q, k)
    error = frobenius(exact - best)
    assert (error < frobenius(exact - Nystromformer(rank, Ridge(0.0)).matrix(q, k))).all()
    left, sigma, right = torch.linalg.svd(exact)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(2, 2, 24, rank, generator=generator, dtype=torch.float64) for _ in range(2))
        basis = torch.linalg.qr(exact @ a).Q
        assert (error < frobenius(exact - basis @ basis.mT @ exact)).all()
        near = (left[..., :rank] + 0.01 * a) * sigma[..., None, :rank] @ (right[..., :rank, :] + 0.01 * b.mT)
        assert (error < frobenius(exact - near)).all()


def test_it_is_not_the_best_for_the_output():
    """P V V^+ has rank d_v and no output error; P_r of the same rank has one, with a smaller error on P."""
    q, k, v = gaussian(24, logit_scale=2.0)
    exact, rank = softmax_weights(q, k), v.shape[-1]
    projected, best = exact @ v @ torch.linalg.pinv(v), TruncatedSVD(rank).matrix(q, k)
    assert (torch.linalg.matrix_rank(projected) == rank).all()
    torch.testing.assert_close(projected @ v, exact @ v, atol=1e-12, rtol=0)
    assert (frobenius((exact - best) @ v) > 0.01 * frobenius(exact @ v)).all()
    assert (frobenius(exact - best) < frobenius(exact - projected)).all()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_gradients_equal_those_of_the_factors_where_these_exist(rank):
    tensors = [x.requires_grad_() for x in gaussian(7, value_dim=3, logit_scale=2.0)]
    found, expected = TruncatedSVD(rank)(*tensors), naive(*tensors, rank)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * cotangent).sum(), tensors),
        torch.autograd.grad((expected * cotangent).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_gradients_where_singular_values_coincide():
    """Within the kept and within the cut part they may: the factors have no gradient there, the truncation has."""
    rotation = torch.linalg.qr(torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)).double()).Q
    sigma = torch.tensor([3.0, 3.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    p = (rotation[0] * sigma @ rotation[1].mT).requires_grad_()
    assert gradcheck(lambda x: truncate(x, 2), [p], eps=1e-6, atol=1e-6)
    wide = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    for x in (wide, wide.detach().mT.contiguous().requires_grad_()):
        assert gradcheck(lambda x: truncate(x, 2), [x])
    level = torch.eye(4, dtype=torch.float64, requires_grad=True)
    truncate(level, 2).sum().backward()
    assert level.grad.isfinite().all(), "no gap, no derivative: finite all the same"


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_every_output_row_is_within_the_next_singular_value(scale):
    """Padded examples too: their padding adds no singular values."""
    q, k, v = gaussian(30, logit_scale=scale)
    mask = torch.arange(30) < torch.tensor([30, 13])[:, None]
    exact = softmax_naive(q, k, v, key_padding_mask=mask)
    for rank in (1, 4, 12, 20):
        operator = TruncatedSVD(rank)
        error = (operator(q, k, v, key_padding_mask=mask) - exact).norm(dim=-1)
        bound = operator.error_bound(q, k, v, key_padding_mask=mask)
        assert (error <= bound)[mask[:, None].expand(2, 2, 30)].all()
        sigma = torch.linalg.svdvals(real_weights(q, k, mask))[..., rank]
        assert (bound[..., 0] <= sigma * torch.linalg.matrix_norm(v, ord=2) + 1e-10).all()


def test_the_counter_knows_it_and_a_bad_rank_names_itself():
    q, k, v = gaussian(40, batch=1)
    assert count_flops(TruncatedSVD(4), q, k, v) > 40**3
    with pytest.raises(ValueError, match="`rank`"):
        TruncatedSVD(0)
