"""Linformer against the package `linformer`, its projections along the sequence copied."""

import pytest
import torch

from attnlens.attention.linformer import Linformer
from attnlens.linalg.length_projection import Learned
from attnlens.testing.inputs import HEAD_DIM
from tests.oracles.feed import EXACT, HEADS, assert_agree, feed, leaves, optional, real_tokens, split_heads

LONGEST = 40


def linformer_module(num_keys):
    """The package's module with the same draw every time."""
    module = optional("linformer.linformer")
    layer = module.LinformerSelfAttention(HEADS * HEAD_DIM, LONGEST, k=num_keys, heads=HEADS).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for matrix in (layer.proj_k, layer.proj_v):
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * num_keys**-0.5)
    layer.to_out = torch.nn.Identity()
    return layer


def operator(layer, num_keys):
    """Every head has the oracle's matrices, which its heads share."""
    made = Linformer(num_keys, Learned(HEADS, LONGEST)).double()
    with torch.no_grad():
        made.projection.keys.copy_(layer.proj_k.mT)
        made.projection.values.copy_(layer.proj_v.mT)
    return made


@pytest.mark.parametrize("logit_scale", [1.0, 9.0])
@pytest.mark.parametrize("length", [40, 33, 5, 1])
@pytest.mark.parametrize("num_keys", [1, 7, 40])
def test_is_that_of_the_package(num_keys, length, logit_scale):
    inputs = leaves(length, logit_scale)
    layer = linformer_module(num_keys)
    expected = split_heads(layer(feed(layer, **dict(zip(("to_q", "to_k", "to_v"), inputs, strict=True)))))
    found = operator(layer, num_keys)(*inputs)
    assert_agree(found, expected, EXACT, inputs=inputs)


def test_matrices_receive_the_gradients_of_the_package():
    inputs = leaves(33)
    layer = linformer_module(7)
    ours = operator(layer, 7)
    direction = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(ours(*inputs), (ours.projection.keys, ours.projection.values), direction)
    out = split_heads(layer(feed(layer, **dict(zip(("to_q", "to_k", "to_v"), inputs, strict=True)))))
    expected = torch.autograd.grad(out, (layer.proj_k, layer.proj_v), direction)
    for x, y in zip(found, expected, strict=True):
        assert_agree(x.sum(0).mT[None, None], y[None, None], EXACT)


@pytest.mark.parametrize("left", [False, True])
def test_padded_examples_are_those_of_the_package_without_their_padding(left):
    """The package takes no mask, but shorter sequences: column j belongs to the j-th real token, wherever it stands."""
    q, k, v = leaves(33)
    mask = real_tokens(33, 33, 12, left=left)
    found = operator(linformer_module(7), 7)(q, k, v, key_padding_mask=mask)
    for example in range(2):
        layer = linformer_module(7)
        q1, k1, v1 = (x[example, :, mask[example]][None] for x in (q, k, v))
        expected = split_heads(layer(feed(layer, to_q=q1, to_k=k1, to_v=v1)))
        assert_agree(found[example, :, mask[example]][None], expected, EXACT)
