"""Exact top-k: the dense masked form, the two remainders and their bounds, the smallest total variation, ties."""

import pytest
import torch

from attnlens.analysis.flops import count_flops
from attnlens.attention.softmax import softmax_naive, softmax_weights
from attnlens.attention.topk import TopK
from attnlens.linalg.selected import ROWS
from attnlens.testing.inputs import gaussian


def dense(q, k, v, num_keys, remainder, causal, mask):
    """Both formulas from the materialized matrix."""
    weights = softmax_weights(q, k, causal=causal, key_padding_mask=mask)
    chosen = weights.topk(min(num_keys, weights.shape[-1])).indices
    kept = torch.zeros_like(weights).scatter(-1, chosen, 1) * weights
    mass = kept.sum(-1, keepdim=True)
    if not remainder:
        return kept @ v / mass
    visible = (weights > 0).to(v)
    return kept @ v + (1 - mass) * (visible @ v) / visible.sum(-1, keepdim=True)


@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [20, ROWS + 20])
def test_equals_the_dense_formula_forward_and_backward(length, causal, remainder):
    tensors = [x.requires_grad_() for x in gaussian(length, value_dim=5, logit_scale=2.0)]
    mask = torch.arange(length) < torch.tensor([length, length // 2])[:, None]
    operator = TopK(6, remainder)
    for padding in (None, mask):
        found = operator(*tensors, causal=causal, key_padding_mask=padding)
        expected = dense(*tensors, 6, remainder, causal, padding)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
        cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for a, b in zip(
            torch.autograd.grad((found * cotangent).sum(), tensors),
            torch.autograd.grad((expected * cotangent).sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_bounds_hold_and_are_sharper_than_twice_the_largest_value(causal, scale):
    """error <= delta diam(V) or delta max|v - mean| <= 2 delta max|v|, in padded examples too."""
    q, k, v = gaussian(50, logit_scale=scale)
    v = v + 3.0
    mask = torch.arange(50) < torch.tensor([50, 31])[:, None]
    exact = softmax_naive(q, k, v, causal=causal, key_padding_mask=mask)
    weights = softmax_weights(q, k, causal=causal, key_padding_mask=mask)
    dropped = weights.sum(-1) - weights.topk(5).values.sum(-1)
    simple = 2 * dropped * v.norm(dim=-1).amax(-1, keepdim=True)
    rows = mask[:, None].expand(2, 2, 50)
    for remainder in (False, True):
        operator = TopK(5, remainder)
        error = (operator(q, k, v, causal=causal, key_padding_mask=mask) - exact).norm(dim=-1)
        bound = operator.error_bound(q, k, v, causal=causal, key_padding_mask=mask)
        assert (error <= bound)[rows].all()
        assert (bound <= simple + 1e-9)[rows].all()


def test_the_remainders_bound_is_the_smaller_one():
    q, k, v = gaussian(50)
    calibrated, renormalized = (TopK(5, remainder).error_bound(q, k, v) for remainder in (True, False))
    assert (calibrated <= renormalized).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_no_other_choice_of_keys_has_a_smaller_total_variation(scale):
    """That of top-k equals the mass dropped; 200 other choices, near ones included, drop more."""
    q, k, _ = gaussian(24, logit_scale=scale)
    exact = softmax_weights(q, k)
    distance = (TopK(6).matrix(q, k) - exact).abs().sum(-1) / 2
    torch.testing.assert_close(distance, 1 - exact.topk(6).values.sum(-1), atol=1e-12, rtol=0)
    generator = torch.Generator().manual_seed(0)
    for draw in range(200):
        noise = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
        index = (exact.log() + 0.02 * draw * noise).topk(6).indices
        other = torch.zeros_like(exact).scatter(-1, index, 1) * exact
        other = other / other.sum(-1, keepdim=True)
        assert (distance <= (other - exact).abs().sum(-1) / 2 + 1e-12).all()


@pytest.mark.parametrize("length", [30, ROWS + 30])
def test_equal_scores_are_taken_in_the_order_of_their_positions(length):
    """torch.topk breaks ties by an order that depends on the length: prefixes and unpadded runs would differ.

    Whole numbers, so that products have no round-off and equal keys do have equal scores.
    """
    q, k, v = gaussian(length)
    q, k = q.round(), k[:, :, torch.arange(length) % 3].round()
    q[:, :, ::5] = 0
    operator, cut = TopK(5), length - 11
    short = [x[:, :, :cut] for x in (q, k, v)]
    whole = operator(q, k, v, causal=True)[:, :, :cut]
    torch.testing.assert_close(operator(*short, causal=True), whole, atol=1e-12, rtol=0)
    padded = operator(q, k, v, key_padding_mask=(torch.arange(length) < cut).expand(2, -1))[:, :, :cut]
    torch.testing.assert_close(operator(*short), padded, atol=1e-12, rtol=0)
    first = v[:, :, :5].mean(2)
    torch.testing.assert_close(padded[:, :, 5], first, atol=1e-12, rtol=0)


def test_the_remainder_mends_most_of_a_diffuse_row():
    """At small logits the mean of a few values is noise about mean(V): above its error. With the remainder most of
    that is gone, yet not all: the chosen keys are counted once more in mean(V), with weight delta / n."""
    q, k, v = gaussian(200, logit_scale=0.3)
    exact = softmax_naive(q, k, v)
    null = (v.mean(2, keepdim=True) - exact).norm()
    renormalized, calibrated = ((TopK(16, remainder)(q, k, v) - exact).norm() for remainder in (False, True))
    assert renormalized > 5 * null
    assert calibrated < 1.1 * null
    weights = softmax_weights(q, k)
    dropped = 1 - weights.topk(16).values.sum(-1, keepdim=True)
    chosen = torch.zeros_like(weights).scatter(-1, weights.topk(16).indices, 1)
    torch.testing.assert_close(
        TopK(16, remainder=True).matrix(q, k), weights * chosen + dropped / 200, atol=1e-12, rtol=0
    )


def test_only_visible_pairs_are_charged_and_every_operator_is_known():
    q, k, v = gaussian(ROWS + 72, batch=1)
    for causal in (False, True):
        few, many = (count_flops(lambda *x, r=r, causal=causal: TopK(r)(*x, causal=causal), q, k, v) for r in (4, 40))
        assert few < many
        count_flops(lambda *x, causal=causal: TopK(4, remainder=True)(*x, causal=causal), q, k, v)


def test_bad_values_name_themselves():
    with pytest.raises(ValueError, match="`num_keys`"):
        TopK(0)
