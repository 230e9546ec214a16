"""SMYRF: the embedding's identity, a loop over rounds and groups as oracle, padding, and what more rounds do."""

import itertools

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.smyrf import Smyrf, asymmetric_projections
from attnlens.attention.softmax import softmax_naive
from attnlens.testing.inputs import EXACT, gaussian


def operator(**overrides):
    config = OmegaConf.load("conf/attention/smyrf.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=128, seed=0, **overrides).double()


def pair_counts(q, k, directions, group_size):
    """c_ij of one head, token by token: how many rounds put query i and key j into groups of one number."""
    n, d = q.shape
    q = q / d**0.5
    top = q.norm(dim=-1).max() ** 2 + k.norm(dim=-1).max() ** 2
    count = torch.zeros(n, n, dtype=q.dtype)
    groups = -(-n // group_size)
    bounds = [g * n // groups for g in range(groups + 1)]
    for w in directions:
        at_q = torch.stack([torch.cat([x, x.new_zeros(1), (top - x @ x).sqrt()[None]]) @ w for x in q])
        at_k = torch.stack([torch.cat([x, (top - x @ x).sqrt()[None], x.new_zeros(1)]) @ w for x in k])
        for start, stop in itertools.pairwise(bounds):
            for i in at_q.argsort()[start:stop].tolist():
                for j in at_k.argsort()[start:stop].tolist():
                    count[i, j] += 1
    return count


def loop_attention(q, k, v, op):
    """Softmax weighted by the counts, head by head."""
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            with torch.no_grad():
                count = pair_counts(q[b, h], k[b, h], op.directions[h], op.group_size)
            weights = count * torch.exp(q[b, h] @ k[b, h].T / q.shape[-1] ** 0.5)
            out.append(weights @ v[b, h] / weights.sum(-1, keepdim=True))
    return torch.stack(out).view(*q.shape[:3], v.shape[-1])


def test_the_embedding_turns_large_logits_into_small_distances():
    """|phi(q) - psi(k)|^2 = 2 (M^2 - <q, k>/sqrt(d)), with maxima of norms; the survey's text has squared norms."""
    q, k, _ = gaussian(7)
    d = 8
    directions = torch.eye(d + 2, dtype=torch.float64).expand(2, d + 2, d + 2)
    phi, psi = (x.mT for x in asymmetric_projections(q, k, directions))
    scaled = q / d**0.5
    top = scaled.norm(dim=-1).amax(-1) ** 2 + k.norm(dim=-1).amax(-1) ** 2
    distance = (phi[:, :, :, None] - psi[:, :, None]).square().sum(-1)
    assert torch.allclose(distance, 2 * (top[..., None, None] - scaled @ k.mT), atol=EXACT)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("length", "group_size"), [(1, 4), (5, 1), (12, 4), (13, 4), (14, 5), (6, 6)])
def test_equals_the_loop_forward_and_backward(length, group_size, rounds):
    op = operator(group_size=group_size, num_rounds=rounds)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(*inputs), loop_attention(*inputs, op)
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@pytest.mark.parametrize("group_size", [3, 5, 16])
def test_padding_anywhere_equals_the_run_without_it(group_size):
    """Groups follow the real tokens, wherever they stand; a padded batch-mate is no reason to regroup."""
    op = operator(group_size=group_size)
    q, k, v = gaussian(21)
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < 0.6
    poisoned = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v)]
    found = op(*poisoned, key_padding_mask=mask)
    for row in range(2):
        short = op(*(x[row : row + 1][:, :, mask[row]] for x in (q, k, v)))
        assert torch.allclose(found[row : row + 1][:, :, mask[row]], short, atol=EXACT)
    assert found.masked_fill(mask[:, None, :, None], 0).eq(0).all()


def test_more_rounds_do_not_lead_to_softmax_but_one_group_does():
    """A key found in many rounds counts many times: the limit of many rounds is weighted by collision probability."""
    q, k, v = gaussian(16, logit_scale=2.0)
    exact = softmax_naive(q, k, v)
    many = operator(group_size=4, num_rounds=400)(q, k, v)
    assert (many - exact).norm() / exact.norm() > 0.05
    assert torch.allclose(operator(group_size=16, num_rounds=3)(q, k, v), exact, atol=EXACT)


def test_groups_hold_more_mass_than_chance_where_keys_match_queries():
    """q_i = k_i with large norms puts all mass on the diagonal, which groups must find far more often than 1/8."""
    k = gaussian(64)[1] * 3
    op = operator(group_size=8, num_rounds=1)
    eye = torch.eye(64, dtype=torch.float64).expand(2, 2, 64, 64)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    found = op(k[:, :, shuffled], k, eye)[..., torch.arange(64), shuffled].gt(0).double().mean().item()
    assert found > 0.4


def test_heads_and_seeds_draw_their_own_directions():
    assert not torch.equal(operator().directions[0], operator().directions[1])
    other = Smyrf(16, 2, head_dim=8, num_heads=2, seed=1).double()
    assert not torch.equal(operator().directions, other.directions)


@pytest.mark.parametrize("argument", ["group_size", "num_rounds"])
def test_bad_arguments_are_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be at least 1, got 0"):
        operator(**{argument: 0})
