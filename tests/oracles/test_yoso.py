"""The expectation of YOSO attention against YosoSelfAttention of transformers."""

from unittest.mock import patch

import pytest
import torch

from attnlens.attention.yoso import Yoso, angular_kernel, unit
from attnlens.testing.inputs import HEAD_DIM, gaussian
from tests.oracles.feed import EXACT, HEADS, assert_agree, feed, optional, real_tokens, split_heads


def yoso_module(q, k, v, num_bits, mask=None):
    module = optional("transformers.models.yoso.modeling_yoso")
    config = module.YosoConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        use_expectation=True,
        hash_code_len=num_bits,
        conv_window=None,
        attention_probs_dropout_prob=0.0,
    )
    # It would compile its kernels, which the expectation does not use, on a machine with a GPU.
    with patch.object(module, "is_torch_cuda_available", return_value=False):
        layer = module.YosoSelfAttention(config)
    hidden = feed(layer, query=q, key=k, value=v)
    marks = torch.zeros(q.shape[0], q.shape[2], dtype=q.dtype)
    marks = marks if mask is None else marks.masked_fill(~mask, -10000.0)
    return split_heads(layer(hidden, marks)[0])


@pytest.mark.parametrize("mask", [None, real_tokens(21, 21, 8), real_tokens(21, 13, 20, left=True)])
@pytest.mark.parametrize("logit_scale", [1.0, 9.0])
@pytest.mark.parametrize("num_bits", [1, 4, 9])
def test_the_expectation_is_that_of_transformers(num_bits, logit_scale, mask):
    q, k, v = gaussian(21, logit_scale=logit_scale)
    found = Yoso(1, num_bits, HEAD_DIM, HEADS, 0, expectation=True)(q, k, v, key_padding_mask=mask)
    assert_agree(found, yoso_module(q, k, v, num_bits, mask), EXACT, mask=mask)


def test_the_gradient_of_values_is_that_of_transformers():
    q, k, v = gaussian(21)
    v.requires_grad_()
    found, expected = Yoso(1, 4, HEAD_DIM, HEADS, 0, expectation=True)(q, k, v), yoso_module(q, k, v, 4)
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=v.dtype)
    ours, theirs = (torch.autograd.grad(out, v, direction)[0] for out in (found, expected))
    assert_agree(ours, theirs, EXACT)


@pytest.mark.parametrize("num_bits", [1, 4, 9])
def test_the_papers_slope_is_a_lower_bound_of_that_of_the_expectation(num_bits):
    """The documented departure: the oracle's backward pass is (tau/2) E B_ij for the slope in cos(theta_ij)."""
    module = optional("transformers.models.yoso.modeling_yoso")
    q, k, _ = gaussian(21, batch=1)
    q, k = (unit(x).flatten(0, 1) for x in (q, k))
    q.requires_grad_()
    ones = torch.ones(q.shape[:2])
    for j in range(21):
        # One key of value one: the gradient in q is the slope times that key.
        key = k[:, j : j + 1]
        one = torch.ones_like(key[..., :1])
        theirs = module.YosoCumulation.apply(ones, ones[:, :1], q, key, one, {"hash_code_len": num_bits})
        slope = (torch.autograd.grad(theirs.sum(), q)[0] * key).sum(-1)
        cosine = (q @ key.mT).detach().requires_grad_()
        exact = torch.autograd.grad(((1 - torch.arccos(cosine) / torch.pi) ** num_bits).sum(), cosine)[0][..., 0]
        kernel = angular_kernel(q[None], key[None], num_bits)[0, ..., 0]
        assert_agree(slope[None, ..., None], (num_bits / 2 * kernel)[None, ..., None], EXACT)
        assert (slope <= exact * (1 + EXACT)).all()
