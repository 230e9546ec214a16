"""Axial attention: two dense masked matrices as oracle, what a causal token sees, its limits, additive logits."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.budget import exact_flops, operator_flops
from attnlens.attention import build
from attnlens.attention.axial import Axial
from attnlens.attention.softmax import softmax_naive
from attnlens.testing.inputs import EXACT, gaussian
from tests.grids import additive


def weights(scores, visible):
    """Softmax under a dense mask; rows without a key are zero."""
    logits = scores.masked_fill(~visible, -torch.inf)
    empty = ~visible.any(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0), -1).masked_fill(~visible, 0)


def product(q, k, columns, causal, mask=None, counted=True):
    """The matrix of axial attention as products of dense masked softmax matrices over all n x n pairs."""
    token = torch.arange(q.shape[2])
    row, column = token // columns, token % columns
    same_row, same_column = row[:, None] == row, column[:, None] == column
    real = torch.ones(q.shape[0], 1, 1, len(token), dtype=torch.bool) if mask is None else mask[:, None, None]
    scores = q @ k.mT / q.shape[-1] ** 0.5
    # log N: how many tokens of the row of j does token i read, by way of j?
    shown = same_row & real & ((token <= token[:, None]) | torch.tensor(not causal))
    counts = (same_row & real).sum(-1).clamp_min(1).double().log()[:, :, None].expand(-1, -1, len(token), -1).clone()
    if causal:
        counts[:, :, token, token] = shown.sum(-1).clamp_min(1).double().log()
    columns_logits = scores + counts if counted else scores
    if not causal:
        return weights(columns_logits, same_column & real) @ weights(scores, same_row & real)
    own = weights(scores, same_row & (token <= token[:, None]) & real)
    whole = weights(scores, same_row & real)
    down = weights(columns_logits, same_column & (token <= token[:, None]) & real)
    return torch.diag_embed(down.diagonal(dim1=2, dim2=3)) @ own + down.tril(-1) @ whole


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "columns"), [(1, 1), (5, 2), (24, 6), (23, 6), (13, 13), (13, 40), (7, 1)])
def test_equals_the_product_of_dense_matrices_forward_and_backward(length, columns, causal):
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = Axial(columns)(*inputs, causal=causal)
    expected = product(*inputs[:2], columns, causal) @ inputs[2]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    # With one row or column a gradient of q or k is zero.
    pairs = [torch.autograd.grad(x, inputs, direction) for x in (found, expected)]
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_anywhere_is_masked_in_both_matrices(causal, counted):
    q, k, v = gaussian(23)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, [0, 4, 12, 13, 14, 15, 16, 17]] = False
    mask[1, 9:] = False
    found = Axial(6, counted)(q, k, v, causal=causal, key_padding_mask=mask)
    expected = product(q, k, 6, causal, mask, counted) @ v
    shown = mask[:, None, :, None].expand_as(found)
    torch.testing.assert_close(found[shown], expected[shown], atol=1e-12, rtol=0)


def test_a_causal_token_sees_itself_and_all_before_and_nothing_after():
    """A mask of rows alone would leave (r, c) the columns up to c of earlier rows: here it sees all of them."""
    q, k, _ = gaussian(23)
    seen = Axial(6).matrix(q, k, causal=True) > 0
    assert torch.equal(seen, torch.ones(23, 23, dtype=torch.bool).tril().expand_as(seen))


@pytest.mark.parametrize("length", [23, 24])
def test_logits_of_zero_give_the_mean_of_what_is_seen(length):
    """Without the counts of tokens, the first tokens of a row have a weight of up to C times that of the others."""
    v = gaussian(length)[2]
    zero = torch.zeros_like(v)
    found = Axial(6)(zero, zero, v, causal=True)
    torch.testing.assert_close(found, softmax_naive(zero, zero, v, causal=True), atol=1e-12, rtol=0)
    plain = Axial(6, count_tokens=False).matrix(zero, zero, causal=True)
    torch.testing.assert_close(plain[..., 6, 6], torch.full((2, 2), 0.5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(plain[..., 6, 0], torch.full((2, 2), 1 / 12, dtype=torch.float64), atol=1e-12, rtol=0)
    if length == 24:
        q, k, v = gaussian(24)
        assert torch.equal(Axial(6)(q, k, v), Axial(6, count_tokens=False)(q, k, v))


def test_a_prefix_of_the_sequence_is_a_prefix_of_the_grid():
    q, k, v = gaussian(23)
    whole = Axial(6)(q, k, v, causal=True)
    for n in (1, 5, 6, 7, 18, 22):
        short = Axial(6)(q[:, :, :n], k[:, :, :n], v[:, :, :n], causal=True)
        torch.testing.assert_close(short, whole[:, :, :n], atol=1e-12, rtol=0)


def test_tokens_whose_column_ends_above_the_last_row_do_not_see_it():
    q, k, _ = gaussian(20)
    seen = Axial(6).matrix(q, k) > 0
    token = torch.arange(20)
    expected = (token[:, None] % 6 < 2) | (token < 18)
    assert torch.equal(seen, expected.expand_as(seen))


@pytest.mark.parametrize("causal", [False, True])
def test_one_row_and_one_column_are_softmax_and_four_columns_are_not(causal):
    q, k, v = gaussian(20)
    exact = softmax_naive(q, k, v, causal=causal)
    gap = {c: (Axial(c)(q, k, v, causal=causal) - exact).abs().max() for c in (1, 4, 20, 99)}
    assert max(gap[1], gap[20], gap[99]) < EXACT
    assert gap[4] > 0.1


def test_additive_logits_on_a_full_grid_are_exact():
    """Rows and columns of the grid have features of their own: s = f(r, r') + g(c, c')."""
    q, k = additive(4, 6, seed=0)
    v = gaussian(24)[2]
    torch.testing.assert_close(Axial(6)(q, k, v), softmax_naive(q, k, v), atol=1e-12, rtol=0)
    assert (Axial(6)(q, k, v, causal=True) - softmax_naive(q, k, v, causal=True)).abs().max() > 0.01


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_bound_holds_under_padding_and_is_near(scale, causal):
    q, k, v = gaussian(23, logit_scale=scale)
    mask = torch.arange(23) < torch.tensor([23, 11])[:, None]
    masks = {"causal": causal, "key_padding_mask": mask}
    for operator in (Axial(6, count_tokens=False), Axial(6)):
        bound = operator.error_bound(q, k, v, **masks)
        error = (operator(q, k, v, **masks) - softmax_naive(q, k, v, **masks)).norm(dim=-1)
        shown = mask[:, None].expand_as(error)
        assert (error <= bound)[shown].all()
    assert bound[shown].median() < 20 * error[shown].median()


def test_the_bound_is_round_off_for_additive_logits():
    q, k = additive(4, 6, seed=0)
    assert (Axial(6).error_bound(q, k, gaussian(24)[2]) < 1e-10).all()


@pytest.mark.parametrize("causal", [False, True])
def test_cost_grows_like_the_power_three_halves_on_square_grids(causal):
    def cost(n):
        return operator_flops(Axial(math.isqrt(n)), *gaussian(n, batch=1, head_dim=64), causal=causal)

    slope = math.log2(cost(4096) / cost(1024)) / 2
    assert abs(slope - 1.5) < 0.1
    assert cost(1024) < 0.2 * exact_flops(*gaussian(1024, batch=1, head_dim=64), causal=causal)


def test_bad_arguments_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="`num_columns` must be at least 1, got 0"):
        build(OmegaConf.load("conf/attention/axial.yaml"), head_dim=8, num_heads=2, max_length=16, num_columns=0)
    q, k, v = gaussian(5)
    with pytest.raises(ValueError, match="as many queries as keys"):
        Axial(3)(q[:, :, :1], k, v)
