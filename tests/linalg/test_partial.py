"""The primitive (out, lse): against the naive form, forward and backward, merged, and at its edges."""

import pytest
import torch

from attnlens.attention.softmax import Softmax, softmax_naive
from attnlens.linalg.online_softmax import online_softmax, online_softmax_backward
from attnlens.linalg.partial import merge, partial_attention


def draw(n=9, m=9, d=4, dv=4, seed=0, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 3, n, d), (batch, 3, m, d), (batch, 3, m, dv))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def naive(q, k, v, bias=None, causal=False):
    """Both outputs from the materialized scores."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    lse = torch.logsumexp(scores.masked_fill(empty, 0), -1).masked_fill(empty[..., 0], -torch.inf)
    return weights @ v, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("m", "dv"), [(9, 4), (9, 2), (9, 7)])
def test_equals_the_naive_form_with_its_gradients(causal, m, dv):
    inputs, twins = draw(m=m, dv=dv), draw(m=m, dv=dv)
    found, expected = partial_attention(*inputs, causal=causal), naive(*twins, causal=causal)
    weights = [torch.randn_like(x) for x in found]
    sum((w * x).sum() for w, x in zip(weights, found, strict=True)).backward()
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    for x, y in zip(inputs, twins, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradcheck_of_each_output_alone_and_of_both(which):
    """The CPU kernel's lse carries no gradient of its own; a merge would silently train on a wrong one."""
    mask = torch.tensor([[True] * 9, [False] * 3 + [True] * 6])

    def run(q, k, v):
        pair = partial_attention(q, k, v, causal=True, key_padding_mask=mask)
        pair = (pair[0], torch.where(pair[1] == -torch.inf, 0, pair[1]))
        return pair if which == 2 else pair[which]

    assert torch.autograd.gradcheck(run, draw())


@pytest.mark.parametrize("causal", [False, True])
def test_bias_hides_and_weighs_keys(causal):
    q, k, v = draw()
    bias = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    bias[0, 0, 4] = -torch.inf
    bias[1, 0, :, 2] = -torch.inf
    found, expected = partial_attention(q, k, v, bias=bias, causal=causal), naive(q, k, v, bias, causal)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found[1][0, :, 4].eq(-torch.inf).all(), "a row that sees no key has lse -inf"
    assert found[0][0, :, 4].eq(0).all()


def test_merging_disjoint_parts_equals_the_whole_with_gradients():
    inputs, twins = draw(m=12), draw(m=12)
    q, k, v = inputs
    mask = torch.zeros(2, 4, dtype=torch.bool)
    parts = [
        partial_attention(q, k[:, :, :5], v[:, :, :5]),
        partial_attention(q, k[:, :, 5:], v[:, :, 5:]),
        # A part that is empty for every row, as an unfilled block is.
        partial_attention(q, k[:, :, :4], v[:, :, :4], key_padding_mask=mask),
    ]
    out, lse = merge(*parts)
    whole, whole_lse = naive(*twins)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-12)
    (out.square().sum() + lse.sum()).backward()
    (whole.square().sum() + whole_lse.sum()).backward()
    for x, y in zip(inputs, twins, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-11)


def test_rows_empty_in_every_part_give_zero_and_no_nan_gradient():
    q, k, v = draw()
    none = torch.zeros(2, 9, dtype=torch.bool)
    out, lse = merge(*(partial_attention(q, k, v, key_padding_mask=none) for _ in range(2)))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths_do_not_end_the_process(n, m):
    """PyTorch 2.13's CPU kernel divides by the length: an empty one is a floating point exception of the process."""
    out, lse = partial_attention(*draw(n=n, m=m))
    assert out.shape == (2, 3, n, 4)
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_is_not_swallowed(where):
    """The CPU kernel turns a NaN query into a row of zeros that looks healthy."""
    inputs = [x.detach().clone() for x in draw()]
    inputs[where][0, 1, 3, 2] = torch.nan
    found, expected = partial_attention(*inputs)[0], naive(*inputs)[0]
    assert torch.equal(found.isnan().any(-1), expected.isnan().any(-1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_portable_form_agrees_with_the_kernel(causal, masked):
    """The chunked form serves every device without a kernel; here both run and agree, forward and backward."""
    q, k, v = draw(n=11, m=11, dtype=torch.float32)
    mask = torch.zeros(2, 1, 1, 11)
    if masked:
        mask[0, ..., 6:] = -torch.inf
    out, lse = online_softmax(q, k, v, mask, causal, 0.5, chunk=4)
    keep = mask[:, 0, 0] == 0
    expected, expected_lse = partial_attention(q, k, v, causal=causal, key_padding_mask=keep, scale=0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-6)
    grad = torch.randn_like(out)
    expected.backward(grad)
    grads = online_softmax_backward(grad, q, k, v, out, lse, mask, causal, 0.5, chunk=4)
    for x, y in zip((q, k, v), grads, strict=True):
        torch.testing.assert_close(x.grad, y, rtol=0, atol=1e-5)


def test_peaky_input_in_float32():
    """Logits of size 100: the error stays at the round-off that scores of this size carry (`Softmax.error_bound`)."""
    q, k, v = (x.detach().float() * s for x, s in zip(draw(n=64, m=64, d=16, dv=16), (6, 6, 1), strict=True))
    exact = softmax_naive(q.double(), k.double(), v.double())
    halves = [partial_attention(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 20), slice(20, 64))]
    error = (merge(*halves)[0] - exact).norm(dim=-1)
    assert (error <= Softmax().error_bound(q, k, v)).all()
