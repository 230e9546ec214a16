"""Reformer: chunks token by token as oracle, the leak of sorted chunks, duplicate counts, shared-QK softmax."""

import itertools

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.reformer import polytope_buckets, shared_softmax_weights
from attnlens.linalg.ranked_chunks import chunk_labels, sees
from attnlens.testing.inputs import EXACT, gaussian

CAUSAL = pytest.mark.parametrize("causal", [False, True])


def operator(max_length=128, seed=0, **overrides):
    config = OmegaConf.load("conf/attention/reformer.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=max_length, seed=seed, **overrides).double()


def bucket(x, rotation):
    """argmax([W x; -W x]) of one token."""
    scores = [float(x @ w) for w in rotation.T] + [-float(x @ w) for w in rotation.T]
    return max(range(len(scores)), key=lambda i: scores[i]) if scores else 0


def found_in(q, rotations, chunk_size, causal):
    """N_ij of one head: in how many rounds the chunk of j is that of i or the one before, within the bucket."""
    n = len(q)
    count = torch.zeros(n, n, dtype=q.dtype)
    for r in range(rotations.shape[1]):
        buckets = [bucket(x, rotations[:, r]) for x in q]
        rank = [buckets[:i].count(b) for i, b in enumerate(buckets)]
        for i, j in itertools.product(range(n), repeat=2):
            near = rank[i] // chunk_size - rank[j] // chunk_size in (0, 1)
            count[i, j] += buckets[i] == buckets[j] and near and (j < i if causal else j != i)
    return count


def loop_attention(q, v, op, causal):
    """Softmax over the union of the rounds, and the own value where it is empty."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        count = found_in(q[b, h].detach(), op.rotations[h], op.chunk_size, causal)
        for i in range(q.shape[2]):
            seen = count[i] > 0
            if not seen.any():
                out[b, h, i] = v[b, h, i]
                continue
            keys = q[b, h, seen] / q[b, h, seen].norm(dim=-1, keepdim=True)
            out[b, h, i] = torch.softmax(keys @ q[b, h, i], -1) @ v[b, h, seen]
    return out


@CAUSAL
@pytest.mark.parametrize(
    ("length", "chunk", "rounds", "buckets"),
    [(1, 2, 1, 2), (9, 1, 2, 2), (13, 2, 3, 2), (26, 3, 2, 4), (24, 4, 1, 1), (12, 20, 2, 2), (17, 2, 2, 16)],
)
def test_equals_the_loop_forward_and_backward(length, chunk, rounds, buckets, causal):
    op = operator(chunk_size=chunk, num_rounds=rounds, num_buckets=buckets)
    q, k, v = gaussian(length, value_dim=5)
    inputs = [q.requires_grad_(), v.requires_grad_()]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(q, k, v, causal=causal), loop_attention(q, v, op, causal)
    assert torch.allclose(found, expected, atol=EXACT)
    gradients = [torch.autograd.grad(x, inputs, direction, allow_unused=True) for x in (found, expected)]
    for x, y in zip(*gradients, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        assert torch.allclose(zero if x is None else x, zero if y is None else y, atol=EXACT)


def test_a_pair_found_in_many_rounds_counts_once():
    """Rounds that are copies of one give that one, and within a row log weight - logit is the same for every pair."""
    q, k, v = gaussian(20)
    one, many = operator(num_rounds=1, num_buckets=4), operator(num_rounds=5, num_buckets=4)
    many.rotations = one.rotations.expand(-1, -1, 5, -1)
    assert torch.allclose(many(q, k, v), one(q, k, v), atol=EXACT)
    mixed = operator(num_rounds=2, num_buckets=4, chunk_size=20)
    weights, logits = mixed.matrix(q, k), q @ torch.nn.functional.normalize(q, dim=-1).mT
    kept = weights > 0
    level = (weights.log() - logits).masked_fill(~kept, torch.nan)
    spread = level - level.nanmean(-1, keepdim=True)
    several = kept & (kept.sum(-1, keepdim=True) > 1)
    assert several.any()
    assert spread[several].abs().max() < 1e-9


def test_causal_outputs_do_not_move_when_a_later_token_enters_an_earlier_bucket():
    """Chunks cut from the list sorted by (bucket, position), as published, shift by one when it does; these do not."""
    op = operator(chunk_size=4, num_buckets=4, num_rounds=1)
    q, k, v = gaussian(40)
    before = op(q, k, v, causal=True)
    buckets = polytope_buckets(q, op.rotations)
    labels, order = chunk_labels(buckets, 4, 4, None)
    first = torch.stack([q[:, h, buckets[0, h, 0].argmin()] for h in range(2)], 1)
    changed = torch.cat([q[:, :, :39], first[:, :, None]], 2)
    assert torch.allclose(op(changed, k, v, causal=True)[:, :, :39], before[:, :, :39], atol=EXACT)
    moved, moved_order = chunk_labels(polytope_buckets(changed, op.rotations), 4, 4, None)
    pairs, moved_pairs = (sees(x[..., :39, None], x[..., None, :39]) for x in (labels, moved))
    assert torch.equal(moved_pairs, pairs)
    by_sorting, by_sorting_moved = (x.argsort(-1)[..., :39] // 4 for x in (order, moved_order))
    assert not torch.equal(by_sorting, by_sorting_moved)


@CAUSAL
def test_output_of_a_prefix_is_that_of_the_whole_where_causal(causal):
    op = operator(chunk_size=3, num_buckets=6)
    q, k, v = gaussian(70)
    whole = op(q, k, v, causal=causal)
    same = [
        torch.allclose(op(*(x[:, :, :n] for x in (q, k, v)), causal=causal), whole[:, :, :n], atol=EXACT)
        for n in (1, 7, 33, 64, 69)
    ]
    assert all(same) if causal else not all(same)


@CAUSAL
def test_padding_anywhere_equals_the_run_without_it(causal):
    op = operator(chunk_size=3, num_buckets=4)
    q, k, v = gaussian(31)
    mask = torch.rand(2, 31, generator=torch.Generator().manual_seed(1)) < 0.6
    poisoned = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v)]
    found = op(*poisoned, causal=causal, key_padding_mask=mask)
    for row in range(2):
        short = op(*(x[row : row + 1][:, :, mask[row]] for x in (q, k, v)), causal=causal)
        assert torch.allclose(found[row : row + 1][:, :, mask[row]], short, atol=EXACT)


@CAUSAL
def test_target_sees_itself_only_alone(causal):
    """Keys of unit length, no further scale, the diagonal only in a row that has nothing else; k is not read."""
    q, k, v = gaussian(9)
    weights = shared_softmax_weights(q, causal=causal, key_padding_mask=None)
    for i in range(9):
        others = [j for j in range(9) if (j < i if causal else j != i)]
        expected = torch.zeros(2, 2, 9, dtype=torch.float64)
        if others:
            keys = q[:, :, others] / q[:, :, others].norm(dim=-1, keepdim=True)
            expected[..., others] = torch.softmax((q[:, :, i, None] * keys).sum(-1), -1)
        else:
            expected[..., i] = 1
        assert torch.allclose(weights[:, :, i], expected)
    op = operator(num_buckets=1, chunk_size=9)
    assert torch.allclose(op(q, k, v, causal=causal), weights @ v, atol=EXACT)
    assert torch.equal(op(q, k, v, causal=causal), op(q, 7 * k, v, causal=causal))


@CAUSAL
def test_more_rounds_only_add_pairs_and_lower_the_bound(causal):
    q, k, v = gaussian(48)
    ops = [operator(num_rounds=r, num_buckets=8, chunk_size=6) for r in (1, 2, 4)]
    for few, more in itertools.pairwise(ops):
        # Rounds of one seed are drawn together: the first ones are made equal by hand.
        more.rotations = torch.cat([few.rotations, more.rotations[:, :, few.rotations.shape[2] :]], 2)
    seen = [op.visible(q, causal=causal, key_padding_mask=None) for op in ops]
    assert all((~few | more).all() for few, more in itertools.pairwise(seen))
    assert seen[2].sum() > seen[0].sum()
    assert torch.equal(ops[2].matrix(q, k, causal=causal) > 0, with_own(seen[2]))
    bounds = [op.error_bound(q, k, v, causal=causal) for op in ops]
    assert all((more <= few + EXACT).all() for few, more in itertools.pairwise(bounds))


def with_own(seen):
    own = torch.eye(seen.shape[-1], dtype=torch.bool) & ~seen.any(-1, keepdim=True)
    return seen | own


def test_buckets_are_uniform_for_orthogonal_vectors_and_agree_more_the_nearer():
    """2 k buckets: orthogonal vectors meet with probability 1/(2 k), nearer ones more often, x and -x never."""
    draws, k = 20000, 4
    rotations = torch.randn(draws, 3, 1, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angle = torch.tensor([0.0, 0.3, 0.8, torch.pi / 2, 2.0, torch.pi], dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin(), torch.zeros(6, dtype=torch.float64)], -1)
    buckets = polytope_buckets(x.expand(1, draws, 6, 3), rotations)[0, :, 0]
    share = (buckets == buckets[:, :1]).double().mean(0)
    assert share[0] == 1
    assert share[-1] == 0
    assert torch.equal(share, share.sort(descending=True).values)
    assert abs(share[3] - 1 / (2 * k)) < 5 * (1 / (2 * k) / draws) ** 0.5
    assert (
        torch.bincount(buckets[:, 0], minlength=2 * k).sub(draws / (2 * k)).abs().max() < 5 * (draws / (2 * k)) ** 0.5
    )


@pytest.mark.parametrize(("chunk_size", "buckets"), [(16, 16), (10, 26), (128, 2), (255, 2), (256, 1)])
def test_default_number_of_buckets_is_two_chunks_a_bucket_and_even(chunk_size, buckets):
    assert max(1, 2 * operator(chunk_size=chunk_size).rotations.shape[-1]) == buckets


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"num_rounds": 0}, "`num_rounds` must be at least 1, got 0"),
        ({"num_buckets": 3}, "`num_buckets` must be 1 or even, got 3"),
    ],
)
def test_bad_arguments_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        operator(**overrides)
