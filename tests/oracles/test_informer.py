"""ProbSparse attention against InformerProbSparseAttention of transformers, given the same sample of keys.

The oracle draws as many keys as there are, with replacement and once for all heads. It is handed the operator's sample,
every key of it equally often: maximum and mean over that are those over the sample.
"""

from unittest.mock import patch

import pytest
import torch

from attnlens.attention.informer import Informer
from attnlens.testing.inputs import HEAD_DIM
from tests.oracles.feed import EXACT, HEADS, assert_agree, feed, leaves, optional, real_tokens, split_heads

# Length, the oracle's factor, and the number of queries that it makes of them: factor * ceil(log(length + 1)).
CASES = [(75, 3, 15), (75, 1, 5), (60, 2, 10), (9, 3, 9)]


def informer_module(q, k, v, factor, sample):
    module = optional("transformers.models.informer.modeling_informer")
    layer = module.InformerProbSparseAttention(HEADS * HEAD_DIM, HEADS, sampling_factor=factor)
    hidden = feed(layer, q_proj=q, k_proj=k, v_proj=v)
    layer.out_proj = torch.nn.Identity()
    n = q.shape[2]

    def draw(low, high, size):
        assert (low, high, size) == (0, n, (n,))
        return sample.repeat(n // len(sample))

    with patch.object(torch, "randint", draw):
        out, weights = layer(hidden)
    return split_heads(out), weights.shape[2]


def operator(num_queries, max_length):
    made = Informer(num_queries, HEADS, max_length, seed=0)
    made.priority = made.priority[:1].expand(HEADS, -1).clone()
    return made


@pytest.mark.parametrize("logit_scale", [1.0, 9.0])
@pytest.mark.parametrize(("length", "factor", "num_queries"), CASES)
def test_chosen_and_other_rows_are_those_of_transformers(length, factor, num_queries, logit_scale):
    inputs = leaves(length, logit_scale)
    ours = operator(num_queries, length)
    sample = ours.priority[0].argsort()[:num_queries]
    expected, chosen = informer_module(*inputs, factor, sample)
    assert chosen == num_queries
    assert_agree(ours(*inputs), expected, EXACT, inputs=inputs)


def test_padded_examples_are_those_of_transformers_without_their_padding():
    """The oracle ranks padding among the queries and averages its values: it is run on the real tokens alone."""
    q, k, v = leaves(75)
    mask = real_tokens(75, 75, 55)
    ours = operator(5, 75)
    found = ours(q, k, v, key_padding_mask=mask)
    for example, count in enumerate((75, 55)):
        alone = [x[example : example + 1, :, :count] for x in (q, k, v)]
        sample = ours.priority[0, :count].argsort()[:5]
        expected, chosen = informer_module(*alone, 1, sample)
        assert chosen == 5
        assert_agree(found[example : example + 1, :, :count], expected, EXACT)
