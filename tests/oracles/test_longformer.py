"""Bidirectional windows, without and with global tokens, against LongformerSelfAttention of transformers."""

import pytest
import torch
from torch.nn import functional as F

from attnlens.attention.longformer import Longformer
from attnlens.attention.window import Window
from attnlens.testing.inputs import HEAD_DIM
from tests.oracles.feed import HEADS, ROUNDED, assert_agree, feed, leaves, optional, real_tokens, split_heads


def longformer_module(q, k, v, one_sided, num_global, mask):
    """LongformerSelfAttention, whose global projections receive the tensors of the others.

    It takes lengths that are multiples of twice its one-sided window: what is missing is padded and cut off again.
    """
    module = optional("transformers.models.longformer.modeling_longformer")
    n = q.shape[2]
    extra = -n % (2 * one_sided)
    real = F.pad(torch.ones(q.shape[0], n).bool() if mask is None else mask, (0, extra))
    q, k, v = (F.pad(x, (0, 0, 0, extra)) for x in (q, k, v))
    config = module.LongformerConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        attention_window=[2 * one_sided],
        attention_probs_dropout_prob=0.0,
    )
    layer = module.LongformerSelfAttention(config, layer_id=0)
    hidden = feed(layer, query=q, key=k, value=v, query_global=q, key_global=k, value_global=v)
    first = torch.arange(n + extra).expand_as(real) < num_global
    marks = torch.zeros(real.shape, dtype=q.dtype).masked_fill(first, 1e4).masked_fill(~real, -1e4)
    out = layer(hidden, marks, is_index_masked=~real, is_index_global_attn=first, is_global_attn=num_global > 0)[0]
    return split_heads(out)[:, :, :n]


# The oracle's slices cannot take a one-sided window of 1.
CASES = [(16, 2), (16, 4), (21, 2), (21, 3), (21, 10), (40, 7)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("length", "one_sided"), CASES)
def test_bidirectional_window_is_that_of_longformer(length, one_sided, padded):
    inputs = leaves(length, dtype=torch.float32)
    mask = real_tokens(length, length, length // 2) if padded else None
    expected = longformer_module(*inputs, one_sided, 0, mask)
    found = Window(one_sided + 1)(*inputs, key_padding_mask=mask)
    assert_agree(found, expected, ROUNDED, inputs=inputs, mask=mask)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_global", [1, 3, 6])
@pytest.mark.parametrize(("length", "one_sided"), CASES)
def test_longformer_is_that_of_transformers_with_shared_projections(length, one_sided, num_global, padded):
    inputs = leaves(length, dtype=torch.float32)
    mask = real_tokens(length, length, length // 2) if padded else None
    expected = longformer_module(*inputs, one_sided, num_global, mask)
    found = Longformer(one_sided + 1, num_global)(*inputs, key_padding_mask=mask)
    assert_agree(found, expected, ROUNDED, inputs=inputs, mask=mask)
