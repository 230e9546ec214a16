"""FAVOR+ against its explicit features, at the scales where others underflow, leak or turn into mean(V)."""

from itertools import pairwise

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.softmax import softmax_naive
from attnlens.linalg.feature_maps import log_linear
from attnlens.linalg.feature_scan import causal_features


def operator(head_dim=8, **overrides):
    config = OmegaConf.load("conf/attention/performer.yaml")
    return build(config, head_dim=head_dim, num_heads=2, max_length=128, seed=0, **overrides)


def inputs(length, *, dtype=torch.float64, scale=1.0, head_dim=8, value_dim=5):
    """Gaussian entries of standard deviation `scale`: logits of standard deviation scale^2."""
    generator = torch.Generator().manual_seed(length)
    widths = (head_dim, head_dim, value_dim)
    q, k, v = (torch.randn(2, 2, length, w, generator=generator, dtype=torch.float64) for w in widths)
    return [x.to(dtype).requires_grad_() for x in (q * scale, k * scale, v)]


def naive(performer, q, k, v, *, is_causal, mask=None):
    """The definition: features explicit, matrix materialized, no stabilizer."""
    kernel = performer.kernel(q, k)
    if is_causal:
        kernel = kernel.tril()
    if mask is not None:
        kernel = kernel * mask[:, None, None]
    return kernel @ v / kernel.sum(-1, keepdim=True).clamp_min(1e-300)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 64, 150])
def test_log_domain_equals_explicit_features_forward_and_backward(length, is_causal):
    tensors = inputs(length)
    performer = operator().double()
    mask = torch.arange(length) < torch.tensor([length, max(1, length // 3)])[:, None]
    for padding in (None, mask):
        out = performer(*tensors, causal=is_causal, key_padding_mask=padding)
        exact = naive(performer, *tensors, is_causal=is_causal, mask=padding)
        torch.testing.assert_close(out, exact, atol=1e-11, rtol=1e-9)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = torch.autograd.grad((out * cotangent).sum(), tensors)
        expected = torch.autograd.grad((exact * cotangent).sum(), tensors)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_rows_sum_to_one_in_float32_at_any_logit_scale(scale, is_causal):
    """fast-transformers' rows sum down to 4e-16 on peaky inputs; scale 10 has logits of +-300 here."""
    q, k, v = (x.detach() for x in inputs(150, dtype=torch.float32, scale=scale, head_dim=64, value_dim=64))
    performer = operator(head_dim=64)
    for queries in (q, -k, k):
        sums = performer.matrix(queries, k, causal=is_causal).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
        single, double = (
            performer(queries.to(t), k.to(t), v.to(t), causal=is_causal).double()
            for t in (torch.float32, torch.float64)
        )
        assert (single - double).norm() < 1e-4 * double.norm()


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_finite_in_float32_at_large_logits(is_causal):
    for sign in (1, -1):
        q, k, v = inputs(100, dtype=torch.float32, scale=6.0, head_dim=64)
        operator(head_dim=64)(sign * k + 0 * q, k, v, causal=is_causal).square().sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_a_huge_future_key_does_not_reach_back():
    """A stabilizer shared by all keys lets the future in through underflow (performer-pytorch: by 0.45)."""
    q, k, v = (x.detach() for x in inputs(70, dtype=torch.float32))
    performer = operator()
    before = performer(q, k, v, causal=True)
    for t in (0, 20, 40, 68):
        later = torch.arange(70)[:, None] > t
        after = performer(torch.where(later, 50 * q, q), torch.where(later, 50 * k, k), v, causal=True)
        torch.testing.assert_close(after[:, :, : t + 1], before[:, :, : t + 1], atol=1e-6, rtol=0)


def test_the_first_causal_row_is_the_first_value_even_against_an_opposite_key():
    """One visible key has weight one, although every feature's product with the query underflows in float32."""
    _, k, v = (x.detach() for x in inputs(1, dtype=torch.float32, scale=30.0, head_dim=64))
    torch.testing.assert_close(operator(head_dim=64)(-k, k, v, causal=True), v)


def test_with_features_enough_it_follows_softmax_and_not_the_mean():
    """performer-pytorch adds 1e-4 to every feature: its output is mean(V) to three digits."""
    q, k, v = (x.detach() for x in inputs(200, scale=0.7, head_dim=16))
    exact = softmax_naive(q, k, v)
    error = (operator(head_dim=16, num_features=4096).double()(q, k, v) - exact).norm()
    assert error < 0.5 * (v.mean(2, keepdim=True) - exact).norm()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_matter(chunk):
    q, k, v = (x.detach() for x in inputs(50))
    features = log_linear(operator().double()._draws(q))
    one = causal_features(features, q, k, v, chunk=50)[1]
    torch.testing.assert_close(causal_features(features, q, k, v, chunk=chunk)[1], one, atol=1e-11, rtol=1e-9)


def test_split_and_resume_is_one_causal_run_and_the_state_is_what_it_says():
    q, k, v = (x.detach() for x in inputs(100))
    performer = operator(num_features=24).double()
    whole = performer(q, k, v, causal=True)
    for cuts in ([0, 100], [0, 1, 64, 65, 100], list(range(101))):
        state, outs = performer.init_state(2, 2, 8, 5, q), []
        for a, b in pairwise(cuts):
            state, out = performer.step(state, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-11, rtol=1e-9)
    assert sum(x[0, 0].numel() for x in state) == 24 * (5 + 1)


def test_heads_and_seeds_draw_differently():
    first = operator().projections
    assert not torch.equal(first[0], first[1])
    other = build(OmegaConf.load("conf/attention/performer.yaml"), head_dim=8, num_heads=2, max_length=128, seed=1)
    assert not torch.equal(first, other.projections)


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="`num_features`"):
        operator(num_features=0)
    with pytest.raises(ValueError, match="`num_heads`"):
        operator()(*(x.detach()[:, :1] for x in inputs(4)))
