"""H-matrix attention: a loop over rows and cells as oracle, correct row sums, error against budget and levels, cost."""

import math
from itertools import pairwise

import pytest
import torch

from attnlens.analysis.flops import measure_flops
from attnlens.attention.hierarchical import Hierarchical
from attnlens.linalg.dense import mean_values, softmax_naive, softmax_weights
from attnlens.testing.inputs import EXACT, gaussian


def loop_attention(q, k, v, b, r, mask, causal, variance, num_sinks=0):
    """The definition, one example, head and row at a time: sinks, keys of near leaves, runs of keys of far cells."""
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for e in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(n):
                scores, values = [], []

                def add(run, first, q=q[e, h, i], k=k[e, h], v=v[e, h], mask=mask[e], scores=scores, values=values):
                    run = [j for j in run if first <= j < n and mask[j]]
                    if run:
                        keys = k[run]
                        spread = (q.square() * keys.var(0, correction=0)).sum() * scale**2 / 2 if variance else 0
                        scores.append(q @ keys.mean(0) * scale + torch.tensor(len(run)).log() + spread)
                        values.append(v[run].mean(0))

                for j in range(min(num_sinks, i + 1 if causal else n)):
                    add([j], 0)
                for j in range(n):
                    if abs(j // b - i // b) <= 1 and (j <= i or not causal):
                        add([j], num_sinks)
                size = b
                while -(-n // size) > 2:
                    own, parent = i // size, i // (2 * size)
                    for cell in range(2 * (parent - 1), 2 * (parent + 2)):
                        if abs(cell - own) > 1 and cell >= 0 and (cell < own or not causal):
                            for run in runs(cell, size, b, r):
                                add(run, num_sinks)
                    size *= 2
                if scores:
                    out[e, h, i] = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
    return out


def runs(cell, size, b, r):
    """Tokens of every point of a cell: runs of a leaf, joined two by two while a cell has more than r."""
    if size == b:
        group = -(-b // r)
        tokens = list(range(cell * b, (cell + 1) * b))
        return [tokens[start : start + group] for start in range(0, b, group)]
    both = runs(2 * cell, size // 2, b, r) + runs(2 * cell + 1, size // 2, b, r)
    return both if len(both) <= r else [both[p] + both[p + 1] for p in range(0, len(both), 2)]


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "b", "r", "num_sinks"), [(5, 1, 1, 0), (19, 2, 2, 0), (33, 4, 3, 0), (26, 3, 2, 5), (24, 2, 5, 1)]
)
def test_equals_the_loop_forward_and_backward(length, b, r, num_sinks, causal, variance):
    inputs = [x[:, :1].contiguous().requires_grad_() for x in gaussian(length, value_dim=5)]
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.7
    mask[0] = True
    op = Hierarchical(b, r, variance=variance, num_sinks=num_sinks)
    found = op(*inputs, causal=causal, key_padding_mask=mask)
    expected = loop_attention(*inputs, b, r, mask, causal, variance, num_sinks)
    rows = mask[:, None, :, None]
    found, expected = torch.where(rows, found, 0), torch.where(rows, expected, 0)
    assert torch.allclose(found, expected, atol=EXACT)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.autograd.grad(out, inputs, direction, retain_graph=True) for out in (found, expected))
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("options", [{}, {"variance": True}, {"by_content": True}])
@pytest.mark.parametrize("causal", [False, True])
def test_row_sums_are_one_on_every_level(causal, options):
    """A published implementation adds up the values of a cell on coarsening and leaves its normalizer at one key: its
    rows sum to 6 to 11. Values that are constant must come out as they went in, at any number of levels."""
    q, k, v = gaussian(200, logit_scale=2.0)
    op = Hierarchical(3, 1, **options)
    ones = op(q, k, torch.ones_like(v), causal=causal)
    assert torch.allclose(ones, torch.ones_like(ones), atol=EXACT)
    if causal or options:
        return
    # The published recipe on the same cells: N_c u_c over e^{s <q, c>} without N_c.
    size, weight, total = 3, torch.zeros(200, dtype=q.dtype), torch.zeros(200, dtype=q.dtype)
    cell = torch.arange(200) // size
    near = (cell[:, None] - cell).abs() <= 1
    weight += near.sum(-1)
    total += near.sum(-1)
    while -(-200 // size) > 2:
        cell = torch.arange(200) // size
        listed = ((cell[:, None] // 2 - cell // 2).abs() <= 1) & ((cell[:, None] - cell).abs() > 1)
        weight += listed.sum(-1)
        total += listed.sum(-1) / size
        size *= 2
    assert (weight / total).min() > 6, "at q = 0 their rows sum to the tokens over the cells"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["smooth", "gaussian"])
def test_error_falls_with_points_and_grows_with_levels(kind, causal):
    """One level refines all far leaves alike; every further level replaces the farthest of them by coarser cells."""
    q, k, v = gaussian(256)
    if kind == "smooth":
        k, v = (torch.cumsum(x, 2) / torch.arange(1, 257).sqrt()[:, None] for x in (k, v))
    exact = softmax_naive(q, k, v, causal=causal)

    def error(*args, **options):
        return (Hierarchical(*args, **options)(q, k, v, causal=causal) - exact).norm().item()

    by_points = [error(8, points) for points in (1, 2, 4, 8, 16, 32, 128)]
    assert all(x > y for x, y in pairwise(by_points))
    assert by_points[-1] < EXACT
    by_levels = [error(8, 2, num_levels=levels) for levels in (1, 2, 3, 4, 9)]
    assert all(x <= y for x, y in pairwise(by_levels))
    assert by_levels[-1] == error(8, 2)
    by_size = [error(size, 2) for size in (8, 32, 128)]
    assert all(x > y for x, y in pairwise(by_size))
    assert by_size[-1] < EXACT
    # The near field alone, renormalized, and no information at all, lose to it.
    assert error(32, 2) < (mean_values(v, causal=causal, key_padding_mask=None) - exact).norm()


def test_more_points_than_the_largest_cell_has_tokens_is_exact():
    for length in (17, 64):
        q, k, v = gaussian(length, logit_scale=3.0)
        for causal in (False, True):
            found = Hierarchical(3, length)(q, k, v, causal=causal)
            assert torch.allclose(found, softmax_naive(q, k, v, causal=causal), atol=EXACT)


def test_variance_makes_the_mass_of_gaussian_keys_right():
    """log sum_j e^{s <q, k_j>} is log N + s <q, c> + s^2 q^T Var q / 2 for many Gaussian keys with a diagonal variance:
    values that mark the far half of the sequence measure its mass."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 4096, 8, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, 8)
    q, v = gaussian(4096, batch=1)[0][:, :1], (torch.arange(4096) >= 3072).double().view(1, 1, -1, 1)
    exact = softmax_naive(q[:, :, :256], k, v)
    plain, corrected = (
        (Hierarchical(512, 1, variance=variance)(q, k, v)[:, :, :256] - exact).abs().mean()
        for variance in (False, True)
    )
    assert corrected < plain / 4


@pytest.mark.parametrize("causal", [False, True])
def test_merging_by_content_is_better_where_topics_alternate(causal):
    generator = torch.Generator().manual_seed(0)
    topic = torch.randint(4, (256,), generator=generator)
    centers, means = torch.randn(2, 2, 2, 4, 8, generator=generator, dtype=torch.float64) * 2
    q, k, v = gaussian(256)
    k, v = centers[:, :, topic] + 0.3 * k, means[:, :, topic] + 0.3 * v
    exact = softmax_naive(q, k, v, causal=causal)
    consecutive, near = (
        (Hierarchical(8, 8, by_content=by_content)(q, k, v, causal=causal) - exact).norm()
        for by_content in (False, True)
    )
    assert near < consecutive / 2


@pytest.mark.parametrize("options", [{}, {"variance": True}, {"by_content": True}, {"num_levels": 2}, {"num_sinks": 4}])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_the_bound_holds_with_every_option_and_padding(causal, scale, options):
    q, k, v = gaussian(50, logit_scale=scale)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < 0.8
    op = Hierarchical(3, 2, **options)
    exact = op.reference(q, k, v, causal=causal, key_padding_mask=mask)
    error = (op(q, k, v, causal=causal, key_padding_mask=mask) - exact).norm(dim=-1)
    bound = op.error_bound(q, k, v, causal=causal, key_padding_mask=mask)
    rows = mask[:, None].expand_as(error)
    assert (error[rows] <= bound[rows] + EXACT).all()
    assert bound[rows].median() < 100 * error[rows].median(), "a bound that says nothing"


def test_coarse_cells_of_a_prefix_are_those_of_the_whole():
    """Levels are added as the sequence grows; what earlier rows read must not change with them."""
    for options in ({}, {"by_content": True, "variance": True}, {"num_levels": 3}, {"num_sinks": 3}):
        q, k, v = gaussian(150)
        op = Hierarchical(2, 2, **options)
        whole = op(q, k, v, causal=True)
        for n in (1, 2, 3, 7, 8, 9, 64, 100, 149):
            part = op(q[:, :, :n], k[:, :, :n], v[:, :, :n], causal=True)
            assert torch.allclose(part, whole[:, :, :n], atol=EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_a_token_that_every_row_looks_at_is_lost_in_a_cell_and_kept_as_a_sink(causal):
    """Layer 15 of SmolLM2-135M, where the first token has most of the weight: .70 without a sink, .33 with one."""
    q, k, v = gaussian(256)
    q[..., 0], k[..., 0] = 4, 0
    k[:, :, 0, 0] = math.log(256) * k.shape[-1] ** 0.5 / 4
    exact = softmax_naive(q, k, v, causal=causal)
    lost, kept = ((Hierarchical(8, 2, num_sinks=s)(q, k, v, causal=causal) - exact).norm() for s in (0, 1))
    assert softmax_weights(q, k, causal=causal)[..., 0].mean() > 0.2
    assert kept < lost / 1.5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"by_content": True, "variance": True}])
def test_cost_is_n_log_n(causal, options):
    """At fixed arguments every doubling of the length adds one level: counted FLOPs over n log2(n) do not grow."""
    lengths, counts = (256, 512, 1024), []
    op = Hierarchical(16, 8, **options)
    for n in lengths:
        inputs = gaussian(n, batch=1, dtype=torch.float32)
        counts.append(measure_flops(lambda q, k, v: op(q, k, v, causal=causal), *inputs).flops / (n * math.log2(n)))
    assert counts[0] * 1.1 > counts[1]
    assert counts[1] * 1.1 > counts[2]


@pytest.mark.parametrize("argument", ["block_size", "num_points", "num_levels"])
def test_bad_arguments_are_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be at least 1, got 0"):
        Hierarchical(**{"block_size": 4, argument: 0})


def test_a_negative_number_of_sinks_is_refused():
    with pytest.raises(ValueError, match="`num_sinks` must be at least 0, got -1"):
        Hierarchical(4, num_sinks=-1)
