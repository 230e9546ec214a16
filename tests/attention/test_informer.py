"""ProbSparse attention: a loop over queries as oracle, the measure against the divergence it bounds."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.informer import sparsity_measure
from attnlens.attention.softmax import softmax_naive, softmax_weights
from attnlens.testing.inputs import EXACT, gaussian


def operator(max_length=128, seed=0, **overrides):
    config = OmegaConf.load("conf/attention/informer.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=max_length, seed=seed, **overrides).double()


def loop_attention(q, k, v, op):
    """The definition of the output, one head and one query at a time."""
    n, u = q.shape[2], min(op.num_queries, q.shape[2])
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            sample = sorted(range(n), key=lambda j, h=h: op.priority[h, j].item())[:u]
            scores = q[b, h] @ k[b, h].T * q.shape[-1] ** -0.5
            measure = [(scores[i, sample].max() - scores[i, sample].mean()).item() for i in range(n)]
            chosen = sorted(range(n), key=lambda i, m=measure: -m[i])[:u]
            for i in range(n):
                out[b, h, i] = torch.softmax(scores[i], -1) @ v[b, h] if i in chosen else v[b, h].mean(0)
    return out


@pytest.mark.parametrize(("length", "num_queries"), [(1, 1), (5, 2), (14, 3), (21, 20), (9, 9), (6, 50)])
def test_equals_the_loop_forward_and_backward(length, num_queries):
    op = operator(num_queries=num_queries)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(*inputs), loop_attention(*inputs, op)
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_measure_on_all_keys_bounds_the_divergence_from_uniform(scale):
    """KL(uniform || P_i) <= M(q_i) <= KL + log n, and Pinsker's inequality turns it into total variation."""
    q, k, _ = gaussian(40, logit_scale=scale)
    measure = sparsity_measure(q, k, torch.arange(40).expand(2, 40), 40, None)
    weights = softmax_weights(q, k)
    divergence = -(weights * 40).log().mean(-1)
    assert (divergence <= measure + EXACT).all()
    assert (measure <= divergence + torch.tensor(40.0).log() + EXACT).all()
    variation = (weights - 1 / 40).abs().sum(-1) / 2
    assert (variation <= (measure / 2).sqrt() + EXACT).all()


def test_the_measure_does_not_depend_on_the_padded_length():
    """The published code divides the sample's sum by the length of the input, so that padding reranks."""
    q, k, _ = gaussian(20)
    priority = operator().priority
    for length in (20, 30, 128):
        wide = [torch.nn.functional.pad(x, (0, 0, 0, length - 20)) for x in (q, k)]
        mask = torch.arange(length).expand(2, length) < 20
        found = sparsity_measure(*wide, priority[:, :length], 6, mask)[..., :20]
        assert torch.allclose(found, sparsity_measure(q, k, priority[:, :20], 6, None))


def test_padding_anywhere_is_neither_sampled_nor_chosen_nor_averaged():
    op = operator(num_queries=4)
    q, k, v = gaussian(21)
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1, 3:] = False
    real = mask[:, None, :, None]
    outs = [
        op(*(torch.where(real, x, fill) for x in (q, k, v)), key_padding_mask=mask).masked_fill(~real, 0)
        for fill in (torch.nan, 50.0)
    ]
    assert torch.equal(*outs)
    exact, mean = softmax_naive(q, k, v, key_padding_mask=mask), (v * real).sum(2) / real.sum(2)
    is_exact = (outs[0] - exact).abs().amax(-1) < EXACT
    is_mean = (outs[0] - mean[:, :, None]).abs().amax(-1) < EXACT
    rows = mask[:, None].expand_as(is_exact)
    assert (is_exact | is_mean)[rows].all()
    assert (is_exact & rows).sum(-1).tolist() == [[4, 4], [mask[1].sum().item()] * 2]


def test_the_peaky_queries_are_chosen():
    """Four of 64 queries are twenty times longer: all of them get their exact row."""
    q, k, v = gaussian(64)
    loud = torch.arange(64) % 16 == 5
    q = torch.where(loud[:, None], 20 * q, 0.1 * q)
    gap = (operator(num_queries=8)(q, k, v) - softmax_naive(q, k, v)).abs().amax(-1)
    assert gap[..., loud].max() < EXACT


def test_heads_and_seeds_draw_their_own_sample():
    assert not torch.equal(operator().priority[0], operator().priority[1])
    assert not torch.equal(operator().priority, operator(seed=1).priority)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`num_queries` must be at least 1, got 0"):
        operator(num_queries=0)
    with pytest.raises(ValueError, match="beyond `max_length`=16: build with a larger one"):
        operator(max_length=16)(*gaussian(17))
