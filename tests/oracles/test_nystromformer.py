"""Nyström attention against NystromformerSelfAttention of transformers, its convolution removed."""

import pytest
import torch

from attnlens.attention.nystromformer import Nystromformer
from attnlens.linalg.pseudo_inverse import NewtonSchulz
from attnlens.testing.inputs import HEAD_DIM, gaussian
from tests.oracles.feed import EXACT, HEADS, assert_agree, feed, leaves, optional, real_tokens, split_heads

CASES = [(12, 4), (12, 6), (35, 7), (35, 5), (64, 16)]


def nystromformer_module(q, k, v, num_landmarks, start="exact"):
    """The module at six steps of its iteration; `start` is "original" for one norm over the whole batch."""
    module = optional("transformers.models.nystromformer.modeling_nystromformer")
    config = module.NystromformerConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_landmarks=num_landmarks,
        segment_means_seq_len=q.shape[2],
        attention_probs_dropout_prob=0.0,
    )
    layer = module.NystromformerSelfAttention(config)
    layer.conv_kernel_size, layer.init_option = None, start
    return split_heads(layer(feed(layer, query=q, key=k, value=v))[0])


def centered(length, logit_scale=1.0):
    """Values of mean zero: there the operator's F Z (B V - mu) + mu is the oracle's F Z B V for every inverse Z."""
    q, k, v = leaves(length, logit_scale)
    return q, k, (v - v.mean(2, keepdim=True)).detach().requires_grad_()


@pytest.mark.parametrize("logit_scale", [1.0, 3.0])
@pytest.mark.parametrize(("length", "num_landmarks"), CASES)
def test_six_steps_are_those_of_transformers(length, num_landmarks, logit_scale):
    inputs = centered(length, logit_scale)
    expected = nystromformer_module(*inputs, num_landmarks)
    operator = Nystromformer(num_landmarks, NewtonSchulz(6))
    assert_agree(operator(*inputs), expected, EXACT)
    # The oracle lets no gradient through mu: only directions that keep it at zero can be compared in v.
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(out, inputs, direction) for out in (operator(*inputs), expected))
    ours, theirs = ((*x[:2], x[2] - x[2].mean(2, keepdim=True)) for x in (ours, theirs))
    for x, y in zip(ours, theirs, strict=True):
        assert_agree(x, y, EXACT)


@pytest.mark.parametrize(("length", "num_landmarks"), CASES)
def test_the_mean_is_taken_out_before_and_added_after_the_regularized_inverse(length, num_landmarks):
    """The documented departure, and the only one here: the oracle's rows do not sum to one."""
    q, k, v = gaussian(length)
    mu = v.mean(2, keepdim=True)
    found = Nystromformer(num_landmarks, NewtonSchulz(6))(q, k, v)
    assert_agree(found, mu + nystromformer_module(q, k, v - mu, num_landmarks), EXACT)
    row_sums = nystromformer_module(q, k, torch.ones_like(v), num_landmarks)
    assert (row_sums - 1).abs().max() > 1e-3
    assert_agree(Nystromformer(num_landmarks, NewtonSchulz(6))(q, k, torch.ones_like(v)), torch.ones_like(v), EXACT)


def test_padded_examples_are_those_of_transformers_without_their_padding():
    """The oracle averages padding into its landmarks; here the padded run equals it on the real tokens alone."""
    q, k, v = centered(35)
    mask = real_tokens(35, 35, 21, left=True)
    v = torch.where(mask[:, None, :, None], v, 1e3)
    v = v - (v * mask[:, None, :, None]).sum(2, keepdim=True) / mask.sum(-1)[:, None, None, None]
    found = Nystromformer(7, NewtonSchulz(6))(q, k, v, key_padding_mask=mask)
    for example, count in enumerate((35, 21)):
        alone = [x[example : example + 1, :, 35 - count :] for x in (q, k, v)]
        assert_agree(found[example : example + 1, :, 35 - count :], nystromformer_module(*alone, 7), EXACT)


def test_the_iteration_starts_from_every_example_alone():
    """The oracle's default starts it from one norm over the batch, so an example's result depends on the others."""
    q, k, v = centered(35, 3.0)
    single = nystromformer_module(q[:1], k[:1], v[:1], 7, "original")[0]
    crowd = nystromformer_module(*(torch.cat([x, 30 * x]) for x in (q, k)), torch.cat([v, v]), 7, "original")[0]
    assert (single - crowd).abs().max() > 1e-3
    one_head = [x[:1, :1] for x in (q, k, v)]
    oracle = nystromformer_module(*(x.expand(-1, HEADS, -1, -1) for x in one_head), 7, "original")
    assert_agree(Nystromformer(7, NewtonSchulz(6))(*one_head), oracle[:, :1], EXACT)
