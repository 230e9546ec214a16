"""Attention with a general kernel: its definition at every f, softmax at exp, where masks stand, vanishing Z."""

import math

import pytest
import torch

from attnlens.attention.general_kernel import BLOCK, KERNELS, GeneralKernel
from attnlens.linalg.dense import softmax_naive

FORMULAS = {
    "exp": math.exp,
    "relu": lambda s: max(s, 0.0),
    "squared_relu": lambda s: max(s, 0.0) ** 2,
    "elu_plus_one": lambda s: s + 1 if s > 0 else math.exp(s),
    "softplus": lambda s: math.log1p(math.exp(s)),
    "polynomial": lambda s: (1 + s) ** 2,
    "identity": lambda s: s,
}
VANISHING = ("exp", "relu", "squared_relu", "elu_plus_one", "softplus")


def inputs(n, m, seed=0):
    """Of positive inner products, so that Z stays away from zero under every f."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, size, 4, dtype=torch.float64, generator=generator) for size in (n, m, m))
    return q.abs() + 0.1, k.abs() + 0.1, v


@pytest.mark.parametrize("f", KERNELS)
def test_f_is_its_formula_and_its_slope(f):
    s = torch.linspace(-3, 3, 12, dtype=torch.float64, requires_grad=True)
    value = KERNELS[f].value(s)
    torch.testing.assert_close(value, torch.tensor([FORMULAS[f](x) for x in s.tolist()], dtype=torch.float64))
    (slope,) = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(KERNELS[f].slope(s.detach()), slope)


@pytest.mark.parametrize("f", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_are_the_definition_forward_and_backward(f, causal):
    m = 2 * BLOCK + 9
    q, k, v = (x.requires_grad_() for x in inputs(m if causal else 7, m))
    mask = torch.arange(m) < torch.tensor([m, BLOCK + 3])[:, None]
    operator, masks = GeneralKernel(f), {"causal": causal, "key_padding_mask": mask}
    ours, expected = operator(q, k, v, **masks), operator.reference(q, k, v, **masks)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn(ours.shape, dtype=torch.float64)
    grads = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (ours, expected))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_exponential_is_softmax(scale):
    q, k, v = torch.randn(3, 1, 2, 30, 4, dtype=torch.float64)
    ours = GeneralKernel("exp")(scale * q, k, v, causal=True)
    torch.testing.assert_close(ours, softmax_naive(scale * q, k, v, causal=True))


@pytest.mark.parametrize("f", KERNELS)
def test_masking_before_the_kernel_is_the_same_only_where_f_vanishes(f):
    q, k, v = inputs(9, 9)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    a = KERNELS[f].value((q @ k.mT / 2).masked_fill(hidden, -torch.inf))
    before, after = a @ v / a.sum(-1, keepdim=True), GeneralKernel(f)(q, k, v, causal=True)
    assert torch.allclose(before, after) == (f in VANISHING)


@pytest.mark.parametrize("f", ["relu", "squared_relu"])
def test_a_row_without_weight_is_zero_and_so_is_its_gradient(f):
    q, k, v = inputs(6, 6)
    q[:, :, 2] *= -1
    q.requires_grad_()
    out = GeneralKernel(f)(q, k, v)
    assert out[:, :, 2].eq(0).all()
    assert out[:, :, [0, 1, 3, 4, 5]].abs().amin() > 0
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad[:, :, 2].eq(0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("f", ["relu", "squared_relu", "identity"])
def test_the_scale_of_homogeneous_kernels_is_normalized_away(f):
    q, k, v = inputs(6, 8)
    torch.testing.assert_close(GeneralKernel(f)(1e-6 * q, k, v), GeneralKernel(f)(q, k, v))


def test_an_unknown_kernel_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"`f` is 'cosine': choose one of \['exp', 'relu'"):
        GeneralKernel("cosine")
