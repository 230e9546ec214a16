"""Shared-QK attention by hashing against two implementations that cut chunks from all tokens sorted by bucket.

Chunks within buckets, as here, and chunks of the sorted sequence coincide where every bucket holds whole chunks. Such
queries are made from the rotations. LSHSelfAttention of transformers lets chunks reach into other buckets and counts
a pair once a round; LSHAttention of reformer-pytorch can mask by bucket and count pairs once, as here.
"""

import functools

import pytest
import torch
from torch.nn import functional as F

from attnlens.attention.reformer import Reformer, polytope_buckets
from attnlens.testing.inputs import HEAD_DIM, gaussian
from tests.oracles.feed import EXACT, HEADS, assert_agree, feed, leaves, optional, real_tokens, split_heads


def seeded_rotations(num_rounds, num_buckets):
    """What the oracle draws from hash_seed = 0 in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randn(HEADS, HEAD_DIM, num_rounds, num_buckets // 2, dtype=torch.float64)


def operator(chunk_size, rotations):
    num_rounds, half = rotations.shape[2:]
    made = Reformer(chunk_size, num_rounds, HEAD_DIM, HEADS, 64, seed=0, num_buckets=2 * half)
    made.rotations = rotations
    return made


def lsh_module(chunk_length, num_rounds, num_buckets, causal, chunks_before):
    module = optional("transformers.models.reformer.modeling_reformer")
    config = module.ReformerConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        attention_head_size=HEAD_DIM,
        lsh_attn_chunk_length=chunk_length,
        lsh_num_chunks_before=chunks_before,
        lsh_attention_probs_dropout_prob=0.0,
        num_hashes=num_rounds,
        num_buckets=num_buckets,
        hash_seed=0,
        is_decoder=causal,
        axial_pos_embds=False,
    )
    layer = module.LSHSelfAttention(config)
    # It divides by sqrt(|q|^2 / d + 1e-6): at zero the keys are of unit length.
    layer._len_norm = functools.partial(layer._len_norm, epsilon=0.0)
    return layer


def transformers_attention(q, v, mask, chunk_length, num_rounds=1, num_buckets=2, causal=False, chunks_before=0):
    layer = lsh_module(chunk_length, num_rounds, num_buckets, causal, chunks_before)
    with torch.random.fork_rng(devices=[]):
        out = layer(feed(layer, query_key=q, value=v), attention_mask=None if mask is None else mask.long())
    return split_heads(out.hidden_states)


def pytorch_attention(q, v, mask, buckets, num_buckets, bucket_size, causal):
    """LSHAttention of reformer-pytorch with given buckets (b, h, r, n); its logits are divided by sqrt(d)."""
    module = optional("reformer_pytorch.reformer_pytorch")
    layer = module.LSHAttention(
        bucket_size=bucket_size,
        n_hashes=buckets.shape[2],
        causal=causal,
        allow_duplicate_attention=False,
        attend_across_buckets=False,
    )
    if mask is not None:
        buckets = torch.where(mask[:, None, None], buckets, num_buckets)
        mask = mask.repeat_interleave(HEADS, 0)
    offset = (num_buckets + 1) * torch.arange(buckets.shape[2])[:, None]
    layer.hash_vectors = lambda *ignored, **settings: (buckets + offset).flatten(2).flatten(0, 1)
    out = layer((q * HEAD_DIM**0.5).flatten(0, 1), v.flatten(0, 1), input_mask=mask)[0]
    return out.view_as(v)


def queries_in_buckets(buckets, rotations, seed=0):
    """Random q whose bucket in round r is buckets[..., r, :]: the other directions of the round are smaller."""
    num_rounds, half = rotations.shape[2:]
    generator = torch.Generator().manual_seed(seed)
    b, h, _, n = buckets.shape
    noise = torch.rand(b, h, n, num_rounds, half, generator=generator, dtype=torch.float64) - 0.5
    top = F.one_hot(buckets.transpose(2, 3) % half, half)
    sign = 1 - 2 * (buckets.transpose(2, 3)[..., None] // half)
    rotated = torch.where(top.bool(), sign * (1 + noise.abs()), noise).flatten(3)
    matrix = rotations.flatten(2)
    q = rotated @ torch.linalg.pinv(matrix)
    assert torch.equal(polytope_buckets(q, rotations), buckets)
    return q


def shuffled(table, padding=0):
    """Buckets (r, n) in another order of the tokens for every example and head, then a mask with padding among them."""
    generator = torch.Generator().manual_seed(2)
    n = table.shape[1]
    order = torch.rand(2, HEADS, n, generator=generator).argsort(-1)
    buckets = table[:, order].permute(1, 2, 0, 3)
    if padding == 0:
        return buckets, None
    mask = torch.ones(2, n + padding, dtype=torch.bool)
    places = torch.rand(2, n + padding, generator=generator).argsort(-1)[:, :padding]
    mask.scatter_(1, places, False)
    spread = torch.zeros(*buckets.shape[:3], n + padding, dtype=torch.long)
    spread[mask[:, None, None].expand_as(spread)] = buckets.flatten()
    return spread, mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "mask", [None, real_tokens(21, 21, 8), real_tokens(21, 13, 20, left=True), real_tokens(21, 1, 2)]
)
@pytest.mark.parametrize("logit_scale", [1.0, 9.0])
def test_one_bucket_and_chunk_is_shared_softmax_of_transformers(logit_scale, mask, causal):
    """Sequences up to a chunk are not hashed there: every other token, or the own one where there is none."""
    q, k, v = leaves(21, logit_scale)
    made = Reformer(21, 1, HEAD_DIM, HEADS, 64, seed=0, num_buckets=1)
    expected = transformers_attention(q, v, mask, 21, causal=causal)
    found = made(q, k, v, causal=causal, key_padding_mask=mask)
    assert_agree(found, expected, EXACT, inputs=(q, v), mask=mask)


@pytest.mark.parametrize(("num_rounds", "num_buckets"), [(1, 2), (2, 8), (4, 6)])
def test_buckets_are_those_of_transformers(num_rounds, num_buckets):
    q, _, _ = gaussian(50)
    layer = lsh_module(5, num_rounds, num_buckets, False, 1)
    with torch.random.fork_rng(devices=[]):
        theirs = layer._hash_vectors(q, num_rounds, None).view(2, HEADS, num_rounds, 50)
    ours = polytope_buckets(q, seeded_rotations(num_rounds, num_buckets))
    assert torch.equal(ours, theirs - num_buckets * torch.arange(num_rounds)[:, None])


# Rounds in which no two tokens meet twice: rows and columns of a square.
SQUARE = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4])
# Some pairs meet twice, some once.
REPEATED = torch.stack([torch.arange(16) // 4, (torch.arange(16) + 2) % 16 // 4])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("num_rounds", [1, 2])
def test_buckets_of_one_chunk_are_those_of_transformers(num_rounds, padding, causal):
    """Own chunks only: with one bucket a chunk there are no others to reach into. The oracle hashes for itself."""
    buckets, mask = shuffled(SQUARE[:num_rounds], padding)
    rotations = seeded_rotations(num_rounds, 4)
    q = queries_in_buckets(buckets, rotations).requires_grad_()
    v = gaussian(q.shape[2])[2].requires_grad_()
    expected = transformers_attention(q, v, mask, 4, num_rounds, 4, causal)
    found = operator(4, rotations)(q, q, v, causal=causal, key_padding_mask=mask)
    assert_agree(found, expected, EXACT, inputs=(q, v), mask=mask)


def pairs_per_round(buckets, causal):
    """How many rounds hold a pair, for buckets of one chunk."""
    held = (buckets[..., :, None] == buckets[..., None, :]).sum(2)
    held = held.masked_fill(torch.eye(held.shape[-1], dtype=torch.bool), 0)
    return held.tril() if causal else held


def counted_softmax(q, v, count):
    """Softmax over the others with integer multiplicities; v_i where there is none."""
    weights = count * torch.exp(q @ F.normalize(q, dim=-1).mT)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights @ v / total.clamp_min(1e-300), v)


@pytest.mark.parametrize("causal", [False, True])
def test_a_pair_found_twice_counts_once_where_transformers_counts_it_twice(causal):
    """The paper divides by the number of rounds that hold a pair; transformers does not."""
    buckets, _ = shuffled(REPEATED)
    rotations = seeded_rotations(2, 4)
    q, v = queries_in_buckets(buckets, rotations), gaussian(16)[2]
    count = pairs_per_round(buckets, causal)
    assert set(count.flatten().tolist()) == {0, 1, 2}
    found = operator(4, rotations)(q, q, v, causal=causal)
    expected = transformers_attention(q, v, None, 4, 2, 4, causal)
    assert_agree(found, counted_softmax(q, v, count.clamp_max(1)), EXACT)
    assert_agree(expected, counted_softmax(q, v, count), EXACT)
    assert (found - expected).abs().max() > 1e-2


# Rounds (r, n), the number of buckets and the chunk: buckets within a chunk, of one, of two, of three and four chunks.
TABLES = {
    "whole buckets": (torch.stack([torch.arange(24) // 6, torch.arange(24) % 4]), 4, 12),
    "three and four chunks": (torch.stack([torch.arange(24) // 6, torch.arange(24) % 4, torch.arange(24) % 3]), 4, 2),
    "two chunks, pairs met twice": (REPEATED, 4, 2),
    "one odd chunk": (torch.stack([torch.arange(15) // 5, torch.arange(15) % 3]), 4, 5),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("case", TABLES)
def test_own_and_previous_chunk_of_the_bucket_are_those_of_reformer_pytorch(case, padding, causal):
    """Masked by bucket and every pair counted once, for buckets of whole chunks; its 1e-9 in log(count) is relative."""
    table, num_buckets, chunk_size = TABLES[case]
    padding = padding * 2 * chunk_size + -table.shape[1] % (2 * chunk_size)
    buckets, mask = shuffled(table, padding)
    rotations = torch.linalg.qr(torch.randn(HEADS, HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(4)))[0]
    rotations = rotations.double()[..., : len(table) * 2].unflatten(-1, (len(table), 2))
    q = queries_in_buckets(buckets, rotations).requires_grad_()
    v = gaussian(q.shape[2])[2].requires_grad_()
    expected = pytorch_attention(q, v, mask, buckets, num_buckets, chunk_size, causal)
    found = operator(chunk_size, rotations)(q, q, v, causal=causal, key_padding_mask=mask)
    assert_agree(found, expected, EXACT, inputs=(q, v), mask=mask)


def test_transformers_reaches_into_the_bucket_before():
    """The documented departure: its previous chunk is another bucket's where a bucket is one chunk."""
    buckets, _ = shuffled(SQUARE[:1])
    rotations = seeded_rotations(1, 4)
    q, v = queries_in_buckets(buckets, rotations), gaussian(16)[2]
    before = (buckets[:, :, 0, :, None] - buckets[:, :, 0, None, :]) % 4 == 1
    count = pairs_per_round(buckets, False)
    expected = transformers_attention(q, v, None, 4, 1, 4, chunks_before=1)
    assert_agree(expected, counted_softmax(q, v, count + before), EXACT)
    assert_agree(operator(4, rotations)(q, q, v), counted_softmax(q, v, count), EXACT)
