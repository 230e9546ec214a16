"""CSALR against its formula with every matrix formed, in its exact limits, and where its core is singular."""

from itertools import pairwise

import pytest
import torch

from attnlens.attention.csalr import Csalr, shifted_core, singles
from attnlens.attention.softmax import softmax_naive


def inputs(length, *, scale=1.0, value_dim=5, head_dim=8, batch=2):
    generator = torch.Generator().manual_seed(length)
    widths = (head_dim, head_dim, value_dim)
    q, k, v = (torch.randn(batch, 2, length, w, generator=generator, dtype=torch.float64) for w in widths)
    return [x.requires_grad_() for x in (q * scale, k * scale, v)]


def factors(q, k, num_landmarks, shift):
    """F', C' and B with every matrix formed."""
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    edges = [s * n // num_landmarks for s in range(num_landmarks + 1)]
    mean_q, mean_k = (torch.stack([x[:, :, a:b].mean(2) for a, b in pairwise(edges)], 2) for x in (q, k))
    f, c, b = (torch.softmax(x @ y.mT * scale, -1) for x, y in ((q, mean_k), (mean_q, mean_k), (mean_q, k)))
    alone = torch.zeros(n, num_landmarks, dtype=q.dtype)
    for s, (start, stop) in enumerate(pairwise(edges)):
        if stop - start == 1:
            alone[start, s] = 1
    return f + shift * alone, c + shift * torch.eye(num_landmarks, dtype=q.dtype), b


def naive(q, k, v, num_landmarks, shift):
    f, c, b = factors(q, k, num_landmarks, shift)
    weights = f @ torch.linalg.inv(c) @ b
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("length", "num_landmarks"), [(2, 1), (12, 4), (13, 8), (33, 16), (33, 17), (33, 32)])
def test_streamed_form_equals_the_matrices_forward_and_backward(length, num_landmarks, shift):
    tensors = inputs(length, scale=1.3)
    found, expected = Csalr(num_landmarks, shift)(*tensors), naive(*tensors, num_landmarks, shift)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-8)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * cotangent).sum(), tensors),
        torch.autograd.grad((expected * cotangent).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_the_formula_is_exact_with_every_token_a_landmark(shift):
    """The operator does not take this way, but the claim is about the formula: (P + c I)(P + c I)^{-1} P = P."""
    q, k, v = (x.detach() for x in inputs(24, scale=1.5))
    torch.testing.assert_close(naive(q, k, v, 24, shift), softmax_naive(q, k, v), atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(Csalr(24, shift)(q, k, v), softmax_naive(q, k, v), atol=1e-12, rtol=1e-12)


def test_rows_sum_to_one_and_the_papers_to_a_half():
    """The paper's product has row sums 1/2, or 1 where a token is alone: it must not be used as it stands."""
    q, k, _ = (x.detach() for x in inputs(30, scale=1.5))
    f, c, b = factors(q, k, 20, 1.0)
    sums = (f @ torch.linalg.inv(c) @ b).sum(-1)
    _, alone = singles(torch.ones(1, 30, dtype=torch.bool), 20)
    assert alone.sum() == 10
    torch.testing.assert_close(sums, (0.5 + 0.5 * alone.double()).expand_as(sums))
    for shift in (1.0, 2.0):
        sums = Csalr(20, shift).matrix(q, k).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-12, rtol=0)


def test_the_condition_number_is_bounded_above_the_papers_shift_only():
    """Landmarks that swap make C a permutation and C + I singular; at c = 2 nothing exceeds (c + 1) / (c - 1) = 3."""
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    q, k = (swap @ torch.eye(2, dtype=torch.float64)).expand(1, 2, 2, 2), torch.eye(2, dtype=torch.float64)
    k = k.expand(1, 2, 2, 2)
    mild = [Csalr(2).condition_number(size * q, k).max().item() for size in (1.0, 10.0, 20.0)]
    assert mild == sorted(mild)
    assert mild[-1] > 1e5
    assert Csalr(2).condition_number(1e5 * q, k).isinf().all()
    for size in (0.1, 1.0, 20.0, 1e5):
        assert Csalr(2, 2.0).condition_number(size * q, k).max() <= 3 + 1e-9
    for scale in (0.1, 1.0, 3.0, 10.0):
        q, k, _ = (x.detach() for x in inputs(64, scale=scale))
        assert Csalr(16, 1.5).condition_number(q, k).max() <= 5 + 1e-9
    assert Csalr(16).condition_number(q, k).shape == (2, 2)


def test_a_singular_core_is_survived_above_the_papers_shift():
    """Four tokens in two segments whose means swap: NaN with the paper's shift, finite with a larger one."""
    q = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64).expand(1, 1, 4, 2) * 1e4
    k = q.flip(2).clone()
    v = torch.randn(1, 1, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.linalg.det(shifted_core(q[:, :, ::2], k[:, :, ::2], 1.0)).abs().max() < 1e-12
    assert Csalr(2, 2.0)(q, k, v).isfinite().all()


def test_padding_between_tokens_and_mixed_lengths_equal_the_short_runs():
    """Which tokens are alone follows each example's own real tokens, wherever the padding stands."""
    q, k, v = (x.detach() for x in inputs(40, batch=4))
    real = torch.rand(4, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    real[1], real[2], real[3] = torch.arange(40) >= 25, torch.arange(40) < 5, torch.arange(40) < 12
    operator = Csalr(8, 2.0)
    out = operator(*(x.masked_fill(~real[:, None, :, None], torch.nan) for x in (q, k, v)), key_padding_mask=real)
    for example in range(4):
        short = operator(*(x[example : example + 1, :, real[example]] for x in (q, k, v)))
        torch.testing.assert_close(out[example : example + 1, :, real[example]], short, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(("name", "value"), [("num_landmarks", 0), ("shift", 0.5), ("shift", float("nan"))])
def test_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Csalr(**{"num_landmarks": 4, name: value})
