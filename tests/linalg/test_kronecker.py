"""Kronecker attention: the dense matrix as oracle, masked cells without underflow, the bound where it is attained."""

import pytest
import torch

from attnlens.linalg.kronecker import kronecker_attention, kronecker_bound


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(logits, real):
    """The softmax of the sums over all pairs of cells."""
    shape = [x.shape[-1] for x in logits]
    place = torch.unravel_index(torch.arange(torch.Size(shape).numel()), shape)
    scores = sum(x[:, :, p[:, None], p] for x, p in zip(logits, place, strict=True))
    if real is None:
        return torch.softmax(scores, -1)
    hidden = ~real.flatten(1)[:, None, None]
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).nan_to_num(0.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (1, 5), (5, 1), (3, 2, 4)])
def test_equals_the_dense_softmax_of_the_sums_forward_and_backward(shape, masked):
    logits = [(3 * draw(2, 2, n, n, seed=n)).requires_grad_() for n in shape]
    v = draw(2, 2, *shape, 5, seed=9).requires_grad_()
    real = draw(2, *shape, seed=10) > -0.3 if masked else None
    if real is not None:
        real[0].flatten()[:2] = torch.tensor([True, False])
    found = kronecker_attention(logits, v, real)
    expected = (dense(logits, real) @ v.flatten(2, -2)).view_as(found)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    direction = draw(*found.shape, seed=11)
    pairs = [torch.autograd.grad(x, [*logits, v], direction) for x in (found, expected)]
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-9)


def test_a_full_grid_is_a_kronecker_product():
    a, b = draw(1, 1, 3, 3), draw(1, 1, 4, 4, seed=1)
    found = kronecker_attention([a, b], torch.eye(12, dtype=torch.float64).view(1, 1, 3, 4, 12), None)
    expected = torch.kron(a[0, 0].softmax(-1), b[0, 0].softmax(-1))
    torch.testing.assert_close(found.flatten(2, 3)[0, 0], expected, atol=1e-14, rtol=0)


def test_a_row_whose_best_cells_are_masked_does_not_underflow():
    """The best row has no real cell in the best column, 200 apart: as a quotient of two Kronecker products in float32
    the weights of the real cells are 0 / 0."""
    first, second = (torch.tensor([[[[200.0, 0.0]] * 2]]) for _ in range(2))
    real = torch.tensor([[[False, False], [False, True]]])
    v = torch.arange(4.0).view(1, 1, 2, 2, 1).requires_grad_()
    products = torch.kron(first[0, 0].softmax(-1), second[0, 0].softmax(-1)) * real.flatten()
    assert products.sum() == 0
    out = kronecker_attention([first, second], v, real)
    assert torch.equal(out, torch.full_like(out, 3.0))
    out.sum().backward()
    assert torch.equal(v.grad.flatten(), torch.tensor([0.0, 0.0, 0.0, 4.0]))


def test_no_real_cell_gives_zero_and_finite_gradients():
    logits = [draw(2, 1, n, n).requires_grad_() for n in (2, 3)]
    v = draw(2, 1, 2, 3, 4).requires_grad_()
    real = torch.zeros(2, 2, 3, dtype=torch.bool)
    real[0] = True
    out = kronecker_attention(logits, v, real)
    assert (out[1] == 0).all()
    grads = torch.autograd.grad(out.square().sum(), [*logits, v])
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_the_bound_is_attained_by_two_opposite_keys(spread):
    """Two keys whose logits differ by `spread` in one row and by -`spread` in the other, values 1 and -1."""
    q = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    k = torch.tensor([spread / 2, -spread / 2], dtype=torch.float64).view(1, 1, 2, 1)
    v = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 1)
    # Terms that are the logits with the other sign: the two rows mirror each other.
    terms = [torch.zeros(1, 1, 1, 1, dtype=torch.float64), -(q @ k.mT)]
    error = (torch.softmax(q @ k.mT, -1) @ v - torch.softmax(terms[1], -1) @ v).abs()[..., 0]
    bound = kronecker_bound(terms, q, k, v, (2,), None)
    torch.testing.assert_close(bound, error, rtol=1e-9, atol=1e-12)
