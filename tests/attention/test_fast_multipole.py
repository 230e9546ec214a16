"""Fast multipole attention: a loop over rows and runs as oracle at learned weights, and what differs from the means."""

import pytest
import torch

from attnlens.analysis.flops import measure_flops
from attnlens.attention.fast_multipole import FastMultipole, num_levels
from attnlens.attention.hierarchical import Hierarchical
from attnlens.testing.inputs import EXACT, gaussian


def trained(block_size, summaries, max_length=128, size=1.5):
    """An operator whose weights are not those of the start."""
    op = FastMultipole(block_size, summaries, num_heads=2, max_length=max_length).double()
    generator = torch.Generator().manual_seed(0)
    for weights in op.weights:
        weights.data = size * torch.randn(weights.shape, dtype=torch.float64, generator=generator)
    return op


def loop_attention(q, k, v, op, summaries, mask, causal):
    """The definition, one example, head and row at a time."""
    n, m = q.shape[2], op.block_size
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for e, h, i in torch.cartesian_prod(*(torch.arange(x) for x in q.shape[:3])).tolist():
        if not mask[e, i]:
            continue
        scores, values = [], []
        for j in range(n):
            if abs(j // m - i // m) <= 1 and (j <= i or not causal) and mask[e, j]:
                scores.append(q[e, h, i] @ k[e, h, j] * q.shape[-1] ** -0.5)
                values.append(v[e, h, j])
        for level, weights in enumerate(op.weights):
            size, run = m << level, -(-m // summaries) << level
            if -(-n // size) <= 2:
                break
            own = i // size
            for group in range(2 * (own // 2 - 1), 2 * (own // 2 + 2)):
                if abs(group - own) <= 1 or group < 0 or (causal and group > own):
                    continue
                for start in range(0, size, run):
                    held = [x for x in range(run) if start + x < size and group * size + start + x < n]
                    held = [x for x in held if mask[e, group * size + start + x]]
                    if held:
                        tokens = [group * size + start + x for x in held]
                        of_key, of_value = torch.softmax(weights[:, h, held], -1)
                        count = torch.tensor(len(held), dtype=q.dtype).log()
                        scores.append(q[e, h, i] @ (of_key @ k[e, h, tokens]) * q.shape[-1] ** -0.5 + count)
                        values.append(of_value @ v[e, h, tokens])
        out[e, h, i] = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "m", "p"), [(7, 1, 1), (29, 4, 2), (34, 3, 2), (26, 2, 4)])
def test_equals_the_loop_forward_and_backward(length, m, p, causal):
    """Gradients of the weights too."""
    op = trained(m, p)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.7
    mask[0] = True
    found = torch.where(mask[:, None, :, None], op(*inputs, causal=causal, key_padding_mask=mask), 0)
    expected = loop_attention(*inputs, op, p, mask, causal)
    assert torch.allclose(found, expected, atol=EXACT)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = [*inputs, *list(op.weights)[: num_levels(length, m)]]
    ours, theirs = (torch.autograd.grad(out, leaves, direction, retain_graph=True) for out in (found, expected))
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in zip(ours, theirs, strict=True))
    assert all(x.any() for x, weights in zip(ours[3:], leaves[3:], strict=True) if weights.shape[-1] > 1)


@pytest.mark.parametrize("causal", [False, True])
def test_it_starts_as_the_hierarchy_of_means(causal):
    """Where runs are the points of `hierarchical`: as many on every level. Any other weights give another operator."""
    q, k, v = gaussian(64)
    means = Hierarchical(4, 2)(q, k, v, causal=causal)
    assert torch.allclose(FastMultipole(4, 2, 2, 64).double()(q, k, v, causal=causal), means, atol=EXACT)
    assert (trained(4, 2)(q, k, v, causal=causal) - means).norm() > 0.05 * means.norm()


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_one_at_any_weights(causal):
    """The paper's convolution has free kernels: its summaries, and rows, then sum to anything."""
    q, k, _ = gaussian(50, logit_scale=2.0)
    weights = trained(3, 2, size=3.0).matrix(q, k, causal=causal)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=EXACT)
    assert weights.min() >= 0


@pytest.mark.parametrize("size", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_the_bound_holds_at_any_weights_and_with_padding(causal, scale, size):
    q, k, v = gaussian(50, logit_scale=scale)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < 0.8
    op = trained(3, 2, size=size)
    exact = op.reference(q, k, v, causal=causal, key_padding_mask=mask)
    error = (op(q, k, v, causal=causal, key_padding_mask=mask) - exact).norm(dim=-1)
    bound = op.error_bound(q, k, v, causal=causal, key_padding_mask=mask)
    rows = mask[:, None].expand_as(error)
    assert (error[rows] <= bound[rows] + EXACT).all()
    assert bound[rows].median() < 100 * error[rows].median(), "a bound that says nothing"


def test_weights_learn_to_pick_the_token_that_matters():
    """Runs of four whose last key alone is large: learned weights come nearer to softmax than means do."""
    q, k, v = gaussian(128)
    k = torch.where((torch.arange(128) % 4 == 3)[:, None], 3 * k, 0.1 * k)
    op = FastMultipole(4, 1, 2, 128).double()
    exact = op.reference(q, k, v)
    start = (op(q, k, v) - exact).square().sum().item()
    optimizer = torch.optim.Adam(op.parameters(), lr=0.1)
    for _ in range(15):
        optimizer.zero_grad()
        loss = (op(q, k, v) - exact).square().sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * start


def test_a_longer_sequence_than_there_are_levels_for_is_refused():
    q, k, v = gaussian(70)
    with pytest.raises(ValueError, match="more levels than `max_length`=32"):
        FastMultipole(4, 2, 2, 32).double()(q, k, v)


def test_cost_at_twice_the_length():
    """n log n, as for `hierarchical`."""
    op, counts = FastMultipole(16, 8, 2, 2048), []
    for n in (1024, 2048):
        inputs = gaussian(n, batch=1, dtype=torch.float32)
        counts.append(measure_flops(lambda q, k, v: op(q, k, v, causal=True), *inputs).flops)
    assert counts[1] < 2.4 * counts[0]


@pytest.mark.parametrize("argument", ["block_size", "num_summaries"])
def test_bad_arguments_are_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be at least 1, got 0"):
        FastMultipole(**{"block_size": 4, "num_summaries": 2, "num_heads": 2, "max_length": 64, argument: 0})
