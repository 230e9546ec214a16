"""Skyformer against its formula, the norms of a block and of its matrix, its residual bound and its exact limit."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.skyformer import Skyformer
from attnlens.linalg.gaussian import gaussian_naive


def inputs(length, *, scale=1.0, value_dim=5, head_dim=8, batch=2):
    generator = torch.Generator().manual_seed(length)
    widths = (head_dim, head_dim, value_dim)
    q, k, v = (torch.randn(batch, 2, length, w, generator=generator, dtype=torch.float64) for w in widths)
    return [x.requires_grad_() for x in (q * scale, k * scale, v)]


def operator(num_landmarks, **overrides):
    config = OmegaConf.load("conf/attention/skyformer.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=128, num_landmarks=num_landmarks, **overrides).double()


def whole(op, q, k):
    """B and B~ of all 2 n points by their definition, every matrix formed."""
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    chosen = op.priority[:, :, :n].topk(min(op.num_landmarks, n), largest=False).indices
    points = torch.cat([q, k], 2)
    marks = torch.cat([x.take_along_dim(rows[None, :, :, None], 2) for x, rows in zip((q, k), chosen, strict=True)], 2)
    b, c, w = (gaussian_naive(x, y, scale) for x, y in ((points, points), (points, marks), (marks, marks)))
    eps = op.ridge * w.sum(-1).amax(-1)[..., None, None]
    return b, c @ torch.linalg.inv(w + eps * torch.eye(w.shape[-1], dtype=w.dtype)) @ c.mT


@pytest.mark.parametrize("ridge", [1e-4, 1e-2])
@pytest.mark.parametrize(("length", "num_landmarks"), [(2, 1), (13, 4), (33, 8)])
def test_streamed_form_equals_the_matrices_forward_and_backward(length, num_landmarks, ridge):
    q, k, v = tensors = inputs(length, scale=0.8)
    op = operator(num_landmarks, ridge=ridge)
    found, expected = op(*tensors), whole(op, q, k)[1][..., :length, length:] @ v
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-8)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((x * cotangent).sum(), tensors) for x in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("num_landmarks", [2, 8, 24])
def test_the_block_is_no_further_off_than_the_whole_matrix(scale, num_landmarks):
    """|A - A~| <= |B - B~|, spectral and Frobenius, and B - B~ is positive semidefinite."""
    q, k, _ = (x.detach() for x in inputs(24, scale=scale))
    op = operator(num_landmarks, ridge=1e-6)
    b, approximation = whole(op, q, k)
    block, whole_error = (op.matrix(q, k) - b[..., :24, 24:]), b - approximation
    for order in (2, "fro"):
        gaps = torch.linalg.matrix_norm(block, order), torch.linalg.matrix_norm(whole_error, order)
        assert (gaps[0] <= gaps[1] * (1 + 1e-9) + 1e-10).all()
    assert torch.linalg.eigvalsh(whole_error).min() > -1e-9


def test_the_bound_holds_row_by_row_and_closes_with_the_landmarks():
    q, k, v = (x.detach() for x in inputs(32, scale=0.3))
    exact = operator(1).reference(q, k, v)
    bounds = []
    for num_landmarks in (2, 8, 32):
        op = operator(num_landmarks, ridge=1e-9)
        bound = op.error_bound(q, k, v)
        assert ((op(q, k, v) - exact).norm(dim=-1) <= bound * (1 + 1e-9)).all()
        bounds.append(bound.mean())
    assert bounds[2] < 1e-3 * bounds[0]
    assert bounds[1] < bounds[0]


def test_exact_with_all_points_even_where_they_repeat():
    """Equal tokens make the core singular; the error of the ridge stays below its size."""
    q, k, v = (x.detach() for x in inputs(10))
    q, k, v = (x.repeat_interleave(3, 2) for x in (q, q + 0 * k, v))
    op = operator(**Skyformer.exact_at(30))
    torch.testing.assert_close(op(q, k, v), op.reference(q, k, v), atol=1e-8, rtol=0)
    single = operator(30).float()
    out = single(q.float(), k.float(), v.float())
    assert out.isfinite().all()
    assert (out - op.reference(q, k, v)).norm() < 1e-2 * op.reference(q, k, v).norm()


def test_the_target_is_not_normalized():
    """Row sums are sums of kernel values: small where queries are far from keys, n where all points coincide."""
    q, k, v = (x.detach() for x in inputs(20))
    op = operator(20)
    torch.testing.assert_close(
        op.reference(q, k, torch.ones_like(v))[..., 0], gaussian_naive(q, k, 8**-0.5).sum(-1), atol=1e-12, rtol=1e-12
    )
    torch.testing.assert_close(op(0 * q, 0 * k, torch.ones_like(v)), torch.full_like(v, 20.0), atol=1e-1, rtol=0)
    with pytest.raises(ValueError, match="`causal=True`"):
        op.reference(q, k, v, causal=True)


def test_padding_between_tokens_and_mixed_lengths():
    """Landmarks are real tokens: with padding anywhere the bound over the real tokens holds, and at the tail the
    result is that of the short run."""
    q, k, v = (x.detach() for x in inputs(40, scale=0.5, batch=3))
    real = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    real[1], real[2] = torch.arange(40) < 25, torch.arange(40) < 5
    op = operator(8)
    poisoned = [x.masked_fill(~real[:, None, :, None], torch.nan) for x in (q, k, v)]
    out, bound = op(*poisoned, key_padding_mask=real), op.error_bound(*poisoned[:2], v, key_padding_mask=real)
    exact = op.reference(q, k, v, key_padding_mask=real)
    error = (out - exact).norm(dim=-1)
    assert (error <= bound)[real[:, None].expand(-1, 2, -1)].all()
    for example, length in ((1, 25), (2, 5)):
        short = op(*(x[example : example + 1, :, :length] for x in (q, k, v)))
        torch.testing.assert_close(out[example : example + 1, :, :length], short, atol=1e-11, rtol=1e-9)


def test_skill_against_its_own_target_on_smooth_kernels():
    q, k, v = (x.detach() for x in inputs(128, scale=0.3, head_dim=8))
    op = operator(32)
    exact = op.reference(q, k, v)
    assert (op(q, k, v) - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize(("name", "value"), [("num_landmarks", 0), ("ridge", 0.0)])
def test_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Skyformer(**{"num_landmarks": 4, "num_heads": 2, "max_length": 8, "seed": 0, name: value})
    with pytest.raises(ValueError, match="`max_length`=128"):
        operator(4)(*(torch.zeros(1, 2, 129, 8, dtype=torch.float64) for _ in range(3)))
