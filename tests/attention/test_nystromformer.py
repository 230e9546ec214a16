"""Nyström attention against numpy's pseudo-inverse, in its exact limits, and where implementations explode."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.nystromformer import Nystromformer
from attnlens.attention.softmax import softmax_naive
from attnlens.linalg.pseudo_inverse import NewtonSchulz, Ridge, RidgePath


def inputs(length, *, scale=1.0, value_dim=5, head_dim=8, batch=2):
    generator = torch.Generator().manual_seed(length)
    widths = (head_dim, head_dim, value_dim)
    q, k, v = (torch.randn(batch, 2, length, w, generator=generator, dtype=torch.float64) for w in widths)
    return [x.requires_grad_() for x in (q * scale, k * scale, v)]


def softmax_rows(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def formula(q, k, v, num_landmarks):
    """F C^+ B V of one head by its definition."""
    n, d = q.shape
    edges = [s * n // num_landmarks for s in range(num_landmarks + 1)]
    mean_q, mean_k = (np.stack([x[a:b].mean(0) for a, b in pairwise(edges)]) for x in (q, k))
    f, c, b = (softmax_rows(x @ y.T / np.sqrt(d)) for x, y in ((q, mean_k), (mean_q, mean_k), (mean_q, k)))
    return f @ np.linalg.pinv(c) @ (b @ v)


def naive(q, k, v, num_landmarks, inverse):
    """The operator's own formula with every matrix formed, for gradients."""
    scale = q.shape[-1] ** -0.5
    edges = [s * q.shape[2] // num_landmarks for s in range(num_landmarks + 1)]
    mean_q, mean_k = (torch.stack([x[:, :, a:b].mean(2) for a, b in pairwise(edges)], 2) for x in (q, k))
    f, c, b = (torch.softmax(x @ y.mT * scale, -1) for x, y in ((q, mean_k), (mean_q, mean_k), (mean_q, k)))
    mu = v.mean(2, keepdim=True)
    return mu + f @ inverse(c, b @ v - mu)


@pytest.mark.parametrize(("length", "num_landmarks"), [(2, 1), (12, 4), (13, 4), (70, 7), (33, 16)])
def test_without_regularization_it_is_the_papers_formula(length, num_landmarks):
    q, k, v = (x.detach() for x in inputs(length, scale=1.5))
    found = Nystromformer(num_landmarks, Ridge(0.0))(q, k, v)
    for index in np.ndindex(2, 2):
        expected = formula(*(x[index].numpy() for x in (q, k, v)), num_landmarks)
        np.testing.assert_allclose(found[index].numpy(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("inverse", [Ridge(1e-3), NewtonSchulz(6)])
@pytest.mark.parametrize("length", [9, 21])
def test_streamed_form_equals_the_matrices_forward_and_backward(length, inverse):
    tensors = inputs(length)
    found, expected = Nystromformer(4, inverse)(*tensors), naive(*tensors, 4, inverse)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * cotangent).sum(), tensors),
        torch.autograd.grad((expected * cotangent).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-7)


def test_equal_tokens_at_the_exact_limit():
    """P of repeated tokens is singular and has no inverse; P P^+ P = P all the same, gradients included."""
    q, k, v = inputs(10)
    doubled = [x.repeat_interleave(2, 2) for x in (q, k, v)]
    out = Nystromformer(20, Ridge(0.0))(*doubled)
    torch.testing.assert_close(out, softmax_naive(*doubled), atol=1e-12, rtol=1e-12)
    mask = torch.arange(20) < torch.tensor([20, 6])[:, None]
    short = Nystromformer(8, Ridge(1e-3))(*doubled, key_padding_mask=mask)
    exact = softmax_naive(*(x[1:, :, :6] for x in doubled))
    torch.testing.assert_close(short[1:, :, :6], exact, atol=1e-12, rtol=1e-12)
    short[mask[:, None].expand(-1, 2, -1)].sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_exact_when_tokens_repeat_within_segments():
    """Then landmarks are tokens, F C^{-1} selects rows, and fewer landmarks than tokens lose nothing."""
    q, k, v = (x.detach() for x in inputs(6, scale=2.0))
    q, k = (x.repeat_interleave(5, 2) for x in (q, k))
    v = torch.randn(2, 2, 30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = softmax_naive(q, k, v)
    torch.testing.assert_close(Nystromformer(6, Ridge(0.0))(q, k, v), exact, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(Nystromformer(6, NewtonSchulz(20))(q, k, v), exact, atol=1e-6, rtol=1e-6)


def test_padding_between_tokens_and_mixed_lengths_equal_the_short_runs():
    """Segments follow each example's own real tokens, wherever the padding stands."""
    q, k, v = (x.detach() for x in inputs(40, batch=3))
    real = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    real[1], real[2] = torch.arange(40) >= 25, torch.arange(40) < 5
    operator = Nystromformer(8, RidgePath(), num_pilots=3)
    out = operator(*(x.masked_fill(~real[:, None, :, None], torch.nan) for x in (q, k, v)), key_padding_mask=real)
    for example in range(3):
        short = operator(*(x[example : example + 1, :, real[example]] for x in (q, k, v)))
        torch.testing.assert_close(out[example : example + 1, :, real[example]], short, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("inverse", [Ridge(1e-3), Ridge(1e-1), NewtonSchulz(2), NewtonSchulz(6)])
def test_rows_sum_to_one_on_peaky_inputs_whatever_the_inverse(inverse):
    """nystrom-attention and HF: row sums of 0.61-1.35 with 256 landmarks on these inputs."""
    q, k, v = (x.detach().float() for x in inputs(512, scale=3.0, head_dim=64, batch=1, value_dim=64))
    operator = Nystromformer(256, inverse)
    sums = operator.matrix(q, k).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-3, rtol=0)
    exact = softmax_naive(q.double(), k.double(), v.double())
    error, null = (operator(q, k, v) - exact).norm(), (v.mean(2, keepdim=True) - exact).norm()
    assert error < 3 * null, "as large as the mean's or a small multiple: never an explosion"


@pytest.mark.parametrize("scale", [1.0, 3**0.5, 3.0])
@pytest.mark.parametrize(("length", "num_landmarks"), [(256, 16), (256, 64), (1024, 64), (1024, 256)])
def test_pilots_keep_the_error_at_that_of_the_mean_on_peaky_inputs(length, num_landmarks, scale):
    """Without them a ridge of 1e-3 has up to 2.5 times the mean's error where q and k are three times unit normal."""
    q, k, v = (x.detach().float() for x in inputs(length, scale=scale, head_dim=64, value_dim=64))
    exact = softmax_naive(q.double(), k.double(), v.double())
    null = (v.mean(2, keepdim=True) - exact).norm()
    plain, piloted = Nystromformer(num_landmarks), Nystromformer(num_landmarks, RidgePath(), num_pilots=32)
    skill = (piloted(q, k, v) - exact).norm() / null
    assert skill <= 1.002
    if scale == 3:
        assert (plain(q, k, v) - exact).norm() / null > 1.02


def test_pilots_fit_what_they_see_at_least_as_well_as_the_mean_and_every_candidate():
    q, k, v = (x.detach() for x in inputs(60, scale=2.5))
    pilots = torch.arange(5) * 12 + 6
    exact, mean = softmax_naive(q, k, v)[:, :, pilots], v.mean(2, keepdim=True)

    def misfit(out):
        return (out - exact).square().sum((-2, -1))

    best = misfit(Nystromformer(12, RidgePath((1e-2, 1e-4)), num_pilots=5)(q, k, v)[:, :, pilots])
    assert (best <= misfit(mean) + 1e-12).all()
    for ridge in (1e-2, 1e-4):
        assert (best <= misfit(Nystromformer(12, Ridge(ridge))(q, k, v)[:, :, pilots]) + 1e-12).all()


def test_a_large_ridge_gives_the_mean_and_not_zero():
    q, k, v = (x.detach() for x in inputs(30))
    out = Nystromformer(5, Ridge(1e12))(q, k, v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-9, rtol=0)


def test_skill_on_sequences_that_segments_resolve():
    """Smooth queries and keys (a low-pass filter over time): clearly below the error of the mean."""
    q, k, v = (x.detach() for x in inputs(256, head_dim=16, value_dim=16))
    position = torch.arange(256, dtype=torch.float64)
    smooth = torch.exp(-((position[:, None] - position) ** 2) / (2 * 12**2))
    q, k = (4 * smooth @ x / smooth.square().sum(-1, keepdim=True).sqrt() for x in (q, k))
    exact = softmax_naive(q, k, v)
    error, null = (Nystromformer(64)(q, k, v) - exact).norm(), (v.mean(2, keepdim=True) - exact).norm()
    assert error < 0.5 * null


def test_the_residual_tells_regularized_from_exact():
    q, k, _ = (x.detach() for x in inputs(64))
    assert Nystromformer(8, Ridge(0.0)).residual(q, k).max() < 1e-6
    early, late = (Nystromformer(8, NewtonSchulz(steps)).residual(q, k) for steps in (2, 8))
    assert early.shape == (2, 2)
    assert (late < early).all()


def test_the_config_takes_either_inverse_and_bad_values_name_themselves():
    config = OmegaConf.load("conf/attention/nystromformer.yaml")
    size = {"head_dim": 8, "num_heads": 2, "max_length": 128}
    assert isinstance(build(config, **size).inverse, RidgePath)
    assert build(config, **size).num_pilots == 8
    other = {"_target_": "attnlens.linalg.pseudo_inverse.NewtonSchulz", "iterations": 6}
    assert build(config, **size, inverse=other).inverse == NewtonSchulz(6)
    with pytest.raises(ValueError, match="`num_landmarks`"):
        build(config, **size, num_landmarks=0)
