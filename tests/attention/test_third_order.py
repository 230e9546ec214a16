"""Third-order attention: streamed against dense and a loop, its pairwise limit, determinants, Match3 by hand."""

import math

import numpy as np
import pytest
import torch

from attnlens.analysis.flops import measure_flops
from attnlens.attention.third_order import ThirdOrder, pair_queries, third_order_attention, third_order_naive
from attnlens.data.match3 import match
from attnlens.linalg.dense import softmax_naive
from attnlens.testing.inputs import gaussian


def _loop(q, k, v, determinant, causal):
    """One head of one example, pair by pair."""
    (k1, k2), (v1, v2) = k.chunk(2, -1), v.chunk(2, -1)
    rows = []
    for i in range(len(q)):
        seen = range(i + 1 if causal else len(k))
        pairs = [(j, m) for j in seen for m in seen]
        if determinant:
            blocks = [slice(c, c + 3) for c in range(0, q.shape[1], 3)]
            scores = [
                sum(torch.linalg.det(torch.stack([q[i, c], k1[j, c], k2[m, c]])) for c in blocks) for j, m in pairs
            ]
        else:
            scores = [(q[i] * k1[j] * k2[m]).sum() for j, m in pairs]
        weights = torch.softmax(torch.stack(scores) / q.shape[1] ** 0.5, 0)
        rows.append(sum(w * v1[j] * v2[m] for w, (j, m) in zip(weights, pairs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("logits", ["product", "determinant"])
def test_the_definition_is_a_softmax_over_pairs(logits, causal):
    q, k, v = gaussian(5, head_dim=6, value_dim=4, arity=2)
    expected = _loop(q[1, 0], k[1, 0], v[1, 0], logits == "determinant", causal)
    found = third_order_naive(q, k, v, logits=logits, causal=causal)[1, 0]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("logits", ["product", "determinant"])
@pytest.mark.parametrize(("length", "block"), [(1, 4), (13, 1), (13, 4), (12, 32)])
def test_streamed_equals_dense_forward_and_backward(length, block, logits, causal):
    inputs = [x.requires_grad_() for x in gaussian(length, head_dim=6, value_dim=5, arity=2, logit_scale=2.0)]
    q, k, v = inputs
    mask = torch.arange(length) < torch.tensor([length, length // 2])[:, None]
    for padding in (None, mask):
        options = {"logits": logits, "causal": causal, "key_padding_mask": padding}
        exact = third_order_naive(q, k, v, **options)
        k0, v0 = (x if padding is None else torch.where(padding[:, None, :, None], x, 0) for x in (k, v))
        found = third_order_attention(q, k0, v0, block=block, **options)
        torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-11)
        expected = torch.autograd.grad(exact.square().sum(), inputs, retain_graph=True)
        for a, b in zip(torch.autograd.grad(found.square().sum(), inputs), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_with_second_keys_and_values_of_ones_it_is_softmax_attention(causal):
    q, k, v = gaussian(20)
    doubled = [torch.cat([x, torch.ones_like(x)], -1) for x in (k, v)]
    found = ThirdOrder()(q, *doubled, causal=causal)
    torch.testing.assert_close(found, softmax_naive(q, k, v, causal=causal), atol=1e-12, rtol=1e-12)


def test_the_matrix_is_the_marginal_of_the_first_token():
    q, k, _ = gaussian(7, arity=2)
    scores = torch.einsum("bhnd,bhjd,bhkd->bhnjk", q, *k.chunk(2, -1)) / 8**0.5
    marginal = scores.flatten(-2).softmax(-1).unflatten(-1, (7, 7)).sum(-1)
    torch.testing.assert_close(ThirdOrder().matrix(q, k), marginal, atol=1e-12, rtol=1e-12)


def _swapped(x):
    return torch.cat(x.chunk(2, -1)[::-1], -1)


def test_products_are_symmetric_in_the_two_tokens_and_determinants_antisymmetric():
    q, k, v = gaussian(9, head_dim=6, arity=2)
    product, determinant = ThirdOrder(), ThirdOrder("determinant")
    torch.testing.assert_close(product(q, _swapped(k), _swapped(v)), product(q, k, v), atol=1e-12, rtol=1e-12)
    swapped = determinant(-q, _swapped(k), _swapped(v))
    torch.testing.assert_close(swapped, determinant(q, k, v), atol=1e-12, rtol=1e-12)
    assert (determinant(q, _swapped(k), _swapped(v)) - determinant(q, k, v)).abs().max() > 0.1
    # A token and itself: two equal columns.
    equal = (pair_queries(q, k[..., :6], "determinant") * k[..., :6]).sum(-1)
    torch.testing.assert_close(equal, torch.zeros_like(equal), atol=1e-12, rtol=0)


def test_determinants_do_not_see_a_common_rotation_of_each_block():
    q, k, v = gaussian(9, head_dim=6, arity=2)
    turn, _ = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    turn = turn * torch.linalg.det(turn)[:, None, None]

    def rotated(x):
        return torch.einsum("...bc,bec->...be", x.unflatten(-1, (-1, 3)), turn).flatten(-2)

    k_turned = torch.cat([rotated(part) for part in k.chunk(2, -1)], -1)
    operator, product = ThirdOrder("determinant"), ThirdOrder()
    torch.testing.assert_close(operator(rotated(q), k_turned, v), operator(q, k, v), atol=1e-12, rtol=1e-11)
    assert (product(rotated(q), k_turned, v) - product(q, k, v)).abs().max() > 0.1
    mirrored = operator(-rotated(q), -k_turned, v)
    assert (mirrored - operator(q, k, v)).abs().max() > 0.1


def test_a_determinant_needs_blocks_of_three_and_logits_have_two_names():
    q, k, v = gaussian(4, head_dim=8, arity=2)
    with pytest.raises(ValueError, match="`head_dim` divisible by 3, got 8"):
        ThirdOrder("determinant")(q, k, v)
    with pytest.raises(ValueError, match="must be 'product' or 'determinant', got 'sum'"):
        ThirdOrder("sum")


def test_cost_is_cubic():
    flops = []
    for length in (64, 128):
        inputs = gaussian(length, batch=1, arity=2, dtype=torch.float32)
        flops.append(measure_flops(lambda *x: ThirdOrder()(*x), *inputs).flops)
    assert 2.9 < math.log2(flops[1] / flops[0]) < 3.05


def match3_by_hand(tokens, modulus):
    """One third-order layer, one head of width 5, over the tokens and a null token at the end: what it puts out for
    every token, 1 for a match and 0 for none.

    cos(a + b + c) is four products of cosines and sines; the pair of null tokens has a logit half way between 1 and the
    nearest miss cos(2 pi/M), and value 0.
    """
    angle = 2 * math.pi * torch.as_tensor(tokens, dtype=torch.float64) / modulus
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    gap = (1 - math.cos(2 * math.pi / modulus)) / 2
    null = torch.zeros(len(angle), 1, 5, dtype=torch.float64)
    null[..., 4] = (1 - gap) ** 0.5
    q = torch.stack([c, -c, -s, -s, one], -1)
    k1, k2 = (torch.cat([torch.stack(x, -1), null], 1) for x in ([c, s, c, s, zero], [c, s, s, c, zero]))
    value = torch.cat([one, zero[:, :1]], 1)[..., None]
    # Enough for all n^2 misses together to weigh e^-5 of the pair of null tokens, and this e^-5 of a match.
    sharpness = (2 * math.log(tokens.shape[1]) + 5) / gap * 5**0.5
    k, v = torch.cat([k1, k2], -1), torch.cat([value, value], -1)
    return third_order_attention(sharpness * q[:, None], k[:, None], v[:, None])[:, 0, :, 0]


@pytest.mark.parametrize(("length", "modulus"), [(12, 107), (24, 419)])
def test_one_layer_of_width_five_decides_match3(length, modulus):
    """Every label of 100 sequences, with the weights written by hand: no error at all."""
    tokens = np.random.default_rng(0).integers(1, modulus, (100, length))
    labels = torch.as_tensor(match(tokens, modulus)).double()
    assert 0.4 < labels.mean() < 0.6
    assert (match3_by_hand(tokens, modulus) - labels).abs().max() < 0.05
