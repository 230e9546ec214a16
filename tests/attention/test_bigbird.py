"""BigBird: the explicit block mask as oracle, forward and backward, and random blocks that keep to their rules."""

import itertools

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import measure_flops
from attnlens.attention import build
from attnlens.attention.bigbird import BigBird, floyd_subset
from attnlens.attention.softmax import softmax_naive
from attnlens.testing.inputs import EXACT, gaussian


def operator(block_size=3, num_global=1, num_random=2, seed=0, max_length=128):
    return BigBird(block_size, 2, max_length, seed, num_global, num_random)


def drawn(numbers, count):
    """Floyd's sampling with Python's sets: all of them where they are not more than asked for."""
    if count <= len(numbers):
        return set(range(count))
    chosen = set()
    for number, last in zip(numbers, range(count - len(numbers), count), strict=True):
        number = number % (last + 1)
        chosen.add(last if number in chosen else number)
    return chosen


def pattern(op, head, n, causal, real=None):
    """The claimed mask of a head, block by block; `real` is the length of the example without padding."""
    s, g = op.block_size, op.num_global
    num_blocks = -(-(real or n) // s)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for block in range(-(-n // s)):
        seen = set(range(g)) | {block - 1, block, block + 1}
        last = block - 1 if causal else num_blocks
        others = [other for other in range(g, last) if other not in seen]
        seen |= {others[rank] for rank in drawn(op.draws[head, block].tolist(), len(others))}
        seen = range(-(-n // s)) if block < g else seen
        for other in seen:
            if other >= 0:
                mask[block * s : (block + 1) * s, other * s : (other + 1) * s] = True
    return mask.tril() if causal else mask


def patterns(op, n, causal, reals=(None, None)):
    return torch.stack([torch.stack([pattern(op, head, n, causal, real) for head in range(2)]) for real in reals])


def masked_attention(q, k, v, visible):
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores.masked_fill(~visible.any(-1, keepdim=True), 0), -1)
    return weights.masked_fill(~visible, 0) @ v


CASES = [(1, 1, 1, 1), (2, 1, 0, 1), (5, 1, 1, 2), (24, 3, 1, 2), (25, 3, 2, 1), (25, 3, 0, 3), (26, 2, 1, 0)]
CASES += [(25, 2, 9, 2), (25, 2, 20, 2), (25, 3, 1, 40), (9, 9, 1, 1), (9, 12, 0, 1), (10, 9, 0, 0)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "block_size", "num_global", "num_random"), CASES)
def test_equals_dense_attention_under_its_mask(length, block_size, num_global, num_random, causal):
    op = operator(block_size, num_global, num_random)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(*inputs, causal=causal), masked_attention(*inputs, patterns(op, length, causal))
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_anywhere_is_skipped_and_blocks_are_drawn_from_the_real_ones(causal):
    op = operator(2, 1, 2)
    q, k, v = gaussian(25)
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[0, [0, 1, 4, 5, 6, 7, 8]] = False
    mask[1, 13:] = False
    visible = patterns(op, 25, causal, (25, 13)) & mask[:, None, None]
    expected = masked_attention(q, k, v, visible)
    found = op(q, k, v, causal=causal, key_padding_mask=mask)
    shown = mask[:, None, :, None].expand_as(found)
    assert torch.allclose(found[shown], expected[shown], atol=EXACT)


def test_subsets_are_uniform_and_without_replacement():
    """Six pairs of four numbers, each as likely; three numbers of two are both and none."""
    draws = torch.randint(2**62, (6000, 2), generator=torch.Generator().manual_seed(0))
    found = floyd_subset(draws, torch.full((6000,), 4)).sort(-1).values
    counts = [(found == torch.tensor(pair)).all(-1).sum().item() for pair in itertools.combinations(range(4), 2)]
    assert sum(counts) == 6000
    # Five standard deviations of a binomial of 6000 with probability 1/6.
    assert all(abs(count - 1000) < 5 * (6000 * 5 / 36) ** 0.5 for count in counts)
    few = floyd_subset(torch.randint(2**62, (7, 3)), torch.full((7,), 2))
    assert torch.equal(few.sort(-1).values, torch.tensor([-1, 0, 1]).expand(7, 3))


def test_the_choice_of_a_causal_block_is_the_same_at_every_length():
    op = operator(2, 1, 2)
    q, k, _ = gaussian(60)
    whole = op.matrix(q, k, causal=True)
    for n in (1, 7, 20, 41):
        assert torch.allclose(op.matrix(q[:, :, :n], k[:, :, :n], causal=True), whole[:, :, :n, :n], atol=EXACT)


def test_heads_and_seeds_draw_their_own_blocks():
    q, k, _ = gaussian(60)
    weights = operator().matrix(q, k) > 0
    assert not torch.equal(weights[:, 0], weights[:, 1])
    assert not torch.equal(weights, operator(seed=1).matrix(q, k) > 0)


@pytest.mark.parametrize("causal", [False, True])
def test_every_pair_of_the_pattern_is_visited_once(causal):
    """A random block that is also a neighbor or global would count twice, a classic fault of block gathers."""
    op = operator(4, 1, 3)
    count = measure_flops(lambda q, k, v: op(q, k, v, causal=causal), *(x[:1] for x in gaussian(96)))
    assert count.unknown == ()
    assert count.visited == int(patterns(op, 96, causal, (None,)).sum())


@pytest.mark.parametrize("causal", [False, True])
def test_bound_holds_under_padding_and_is_attained_by_opposite_values(causal):
    q, k, v = gaussian(20, logit_scale=2.0)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    op = operator(2, 1, 1)
    bound = op.error_bound(q, k, v, causal=causal, key_padding_mask=mask)
    error = op(q, k, v, causal=causal, key_padding_mask=mask) - softmax_naive(
        q, k, v, causal=causal, key_padding_mask=mask
    )
    assert (error.norm(dim=-1) <= bound)[mask[:, None].expand_as(bound)].all()
    sign = 2 * patterns(op, 20, causal)[:, :, 19].double() - 1
    v = sign[..., None] * torch.ones_like(v)
    error = (op(q, k, v, causal=causal) - softmax_naive(q, k, v, causal=causal)).norm(dim=-1)
    assert torch.allclose(error[..., 19], op.error_bound(q, k, v, causal=causal)[..., 19], rtol=1e-6)


def test_bad_arguments_are_refused_and_the_config_builds():
    for argument, least in (("block_size", 1), ("num_global", 0), ("num_random", 0)):
        with pytest.raises(ValueError, match=f"`{argument}` must be at least {least}, got {least - 1}"):
            operator(**{argument: least - 1})
    q, k, v = gaussian(5)
    with pytest.raises(ValueError, match="length 5 is beyond `max_length`=4"):
        operator(max_length=4)(q, k, v)
    config = OmegaConf.load("conf/attention/bigbird.yaml")
    assert build(config, head_dim=8, num_heads=2, max_length=128, seed=0, block_size=3).block_size == 3
