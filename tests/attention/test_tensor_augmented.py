"""Tensor-augmented attention: the formula with projected keys and values, limits, bound, what it stores and costs."""

import pytest
import torch
from torch.autograd import gradcheck

from attnlens.analysis.budget import exact_flops, operator_flops
from attnlens.attention.softmax import softmax_naive
from attnlens.attention.tensor_augmented import TensorAugmented, compress
from attnlens.testing.inputs import EXACT, gaussian


def projected(x, columns, rank):
    """Mean and centered tensor times orthogonal projectors, from singular vectors of what each mode is left with."""
    mean = x.mean(2, keepdim=True)
    b, h, n, d = x.shape
    rows = -(-n // columns)
    grid = torch.cat([x - mean, x.new_zeros(b, h, rows * columns - n, d)], 2).view(b, h, rows, columns, d)
    for axis in (4, 3, 2):
        unfolded = grid.movedim(axis, 2).flatten(3)
        basis = torch.linalg.svd(unfolded, full_matrices=False).U[..., :rank]
        moved = (basis @ basis.mT @ unfolded).view(grid.movedim(axis, 2).shape)
        grid = moved.movedim(2, axis)
    return mean + grid.flatten(2, 3)[:, :, :n]


@pytest.mark.parametrize(("length", "columns", "rank"), [(24, 6, 3), (23, 6, 3), (24, 4, 5), (5, 8, 2), (40, 8, 1)])
def test_equals_softmax_over_the_projected_tensors(length, columns, rank):
    q, k, v = gaussian(length, value_dim=5)
    operator = TensorAugmented(columns, rank)
    for x in (k, v):
        torch.testing.assert_close(operator.reconstruct(x), projected(x, columns, rank), atol=1e-10, rtol=0)
    expected = softmax_naive(q, projected(k, columns, rank), projected(v, columns, rank))
    torch.testing.assert_close(operator(q, k, v), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_go_through_the_factors(rank):
    inputs = [x.requires_grad_() for x in gaussian(11, batch=1, head_dim=4, value_dim=5)]
    assert gradcheck(TensorAugmented(3, rank), inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_padding_is_not_compressed_with_the_rest():
    q, k, v = gaussian(23)
    mask = torch.arange(23) < torch.tensor([23, 11])[:, None]
    operator = TensorAugmented(6, 2)
    found = operator(*(x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v)), key_padding_mask=mask)
    alone = operator(q[1:, :, :11], k[1:, :, :11], v[1:, :, :11])
    torch.testing.assert_close(found[1:, :, :11], alone, atol=1e-10, rtol=0)


def test_tensors_of_low_rank_are_exact_whatever_their_means():
    generator = torch.Generator().manual_seed(0)
    k, v = (
        torch.einsum(
            "bhra,bhca,bhda->bhrcd", *(torch.randn(2, 2, n, 2, generator=generator).double() for n in (4, 6, 8))
        )
        for _ in range(2)
    )
    k, v = (x - x.mean((2, 3), keepdim=True) for x in (k, v))
    k, v = (x.flatten(2, 3) for x in (k, v))
    q = gaussian(24)[0]
    operator = TensorAugmented(6, 3)
    exact = softmax_naive(q, k, v)
    torch.testing.assert_close(operator(q, k, v), exact, atol=1e-9, rtol=0)
    torch.testing.assert_close(operator(q, k + 5, v + 7), exact + 7, atol=1e-8, rtol=0)
    assert (TensorAugmented(6, 1)(q, k, v) - exact).abs().max() > 0.01


def test_constant_values_are_kept_and_full_rank_is_softmax():
    q, k, v = gaussian(40)
    ones = torch.ones_like(v)
    torch.testing.assert_close(TensorAugmented(8, 1)(q, k, ones), ones, atol=1e-12, rtol=0)
    errors = [(TensorAugmented(8, r)(q, k, v) - softmax_naive(q, k, v)).norm().item() for r in (1, 7, 8)]
    assert errors[2] < EXACT < errors[1] < errors[0]
    left = [(k - TensorAugmented(8, r).reconstruct(k)).norm().item() for r in range(1, 9)]
    assert left == sorted(left, reverse=True)


def test_attention_over_core_tokens_is_not_softmax_at_full_rank():
    """Why the token modes are expanded again: with all singular vectors kept, the core's own softmax is another."""
    q, k, v = gaussian(24)
    _, of_keys = compress(k, 6, 24, None)
    rows, columns = (torch.linalg.svd(of_keys.core.movedim(axis, 2).flatten(3)).U for axis in (2, 3))
    turn = torch.einsum("bhra,bhcs->bhrcas", rows, columns).flatten(4).flatten(2, 3)
    core = softmax_naive(q, turn.mT @ k, turn.mT @ v)
    assert (core - softmax_naive(q, k, v)).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_bound_holds_under_padding_and_is_near(scale):
    q, k, v = gaussian(23, logit_scale=scale)
    mask = torch.arange(23) < torch.tensor([23, 11])[:, None]
    for rank in (1, 3, 5):
        operator = TensorAugmented(6, rank)
        bound = operator.error_bound(q, k, v, key_padding_mask=mask)
        error = (operator(q, k, v, key_padding_mask=mask) - softmax_naive(q, k, v, key_padding_mask=mask)).norm(dim=-1)
        shown = mask[:, None].expand_as(error)
        assert (error <= bound)[shown].all()
        assert bound[shown].median() < 50 * error[shown].median()


def test_queries_need_not_be_the_keys_and_do_not_move_the_factors():
    q, k, v = gaussian(20)
    operator = TensorAugmented(4, 2)
    torch.testing.assert_close(operator(q[:, :, :3], k, v), operator(q, k, v)[:, :, :3], atol=1e-12, rtol=0)


def test_what_is_stored_and_what_is_computed():
    """Cores and factors are far smaller than the keys; arithmetic falls with the features alone, not below the share
    that all m scores of a row take."""
    q, k, v = gaussian(1024, batch=1, head_dim=64)
    _, parts = compress(k, 32, 8, None)
    assert parts.size() == 8**3 + 8 * (32 + 32 + 64)
    assert parts.size() < 0.025 * k[0, 0].numel()
    exact = exact_flops(q, k, v, causal=False)
    costs = [operator_flops(TensorAugmented(32, r), q, k, v, causal=False) / exact for r in (4, 16, 64)]
    assert costs[0] < 0.25
    assert costs[1] < 0.45
    assert costs[2] < 1.01
    assert costs == sorted(costs)


def test_causal_and_bad_arguments_are_refused():
    q, k, v = gaussian(5)
    with pytest.raises(ValueError, match="`causal=True`"):
        TensorAugmented(3, 2)(q, k, v, causal=True)
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        TensorAugmented(3, 0)
    with pytest.raises(ValueError, match="`num_columns` must be at least 1, got 0"):
        TensorAugmented(0, 2)
