"""Softmax and causal sliding-window attention against the attention modules of Llama, BERT and Mistral."""

import pytest
import torch

from attnlens.attention.softmax import Softmax
from attnlens.attention.window import Window
from attnlens.testing.inputs import HEAD_DIM
from tests.oracles.feed import EXACT, HEADS, ROUNDED, assert_agree, feed, leaves, optional, real_tokens, split_heads

WIDTH = HEADS * HEAD_DIM
# transformers' own softmax is in float32 in Llama and Mistral; its call of PyTorch's kernel keeps float64.
BACKENDS = [("eager", torch.float32, ROUNDED), ("sdpa", torch.float64, EXACT)]
PADDINGS = [None, real_tokens(21, 21, 13), real_tokens(21, 8, 20, left=True)]


def causal_module(family, backend, q, k, v, mask, **settings):
    """A causal attention module of transformers, with the mask its model would make and a rotation by zero."""
    module = optional(f"transformers.models.{family}.modeling_{family}")
    masking = optional("transformers.masking_utils")
    name = family.capitalize()
    config = getattr(module, f"{name}Config")(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD_DIM, **settings
    )
    config._attn_implementation = backend
    layer = getattr(module, f"{name}Attention")(config, layer_idx=0)
    hidden = feed(layer, q_proj=q, k_proj=k, v_proj=v)
    layer.o_proj = torch.nn.Identity()
    make = masking.create_sliding_window_causal_mask if "sliding_window" in settings else masking.create_causal_mask
    attention_mask = make(config, hidden, None if mask is None else mask.long(), None)
    still = torch.ones(1, q.shape[2], HEAD_DIM, dtype=q.dtype), torch.zeros(1, q.shape[2], HEAD_DIM, dtype=q.dtype)
    return split_heads(layer(hidden, still, attention_mask)[0])


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("mask", PADDINGS)
@pytest.mark.parametrize("logit_scale", [1.0, 9.0])
def test_causal_softmax_is_that_of_llama(backend, dtype, tolerance, mask, logit_scale):
    inputs = leaves(21, logit_scale, dtype)
    expected = causal_module("llama", backend, *inputs, mask)
    found = Softmax()(*inputs, causal=True, key_padding_mask=mask)
    assert_agree(found, expected, tolerance, inputs=inputs, mask=mask)


@pytest.mark.parametrize("mask", PADDINGS)
@pytest.mark.parametrize("logit_scale", [1.0, 9.0])
def test_bidirectional_softmax_is_that_of_bert(mask, logit_scale):
    bert, masking = optional("transformers.models.bert.modeling_bert"), optional("transformers.masking_utils")
    config = bert.BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "eager"
    layer = bert.BertSelfAttention(config)
    inputs = leaves(21, logit_scale)
    hidden = feed(layer, **dict(zip(("query", "key", "value"), inputs, strict=True)))
    attention_mask = masking.create_bidirectional_mask(config, hidden, None if mask is None else mask.long())
    found = Softmax()(*inputs, key_padding_mask=mask)
    assert_agree(found, split_heads(layer(hidden, attention_mask)[0]), EXACT, inputs=inputs, mask=mask)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("mask", PADDINGS)
@pytest.mark.parametrize("window", [1, 2, 5, 20, 21, 40])
def test_causal_window_is_that_of_mistral(backend, dtype, tolerance, mask, window):
    inputs = leaves(21, dtype=dtype)
    expected = causal_module("mistral", backend, *inputs, mask, sliding_window=window)
    found = Window(window)(*inputs, causal=True, key_padding_mask=mask)
    assert_agree(found, expected, tolerance, inputs=inputs, mask=mask)
