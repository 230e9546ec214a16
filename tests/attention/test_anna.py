"""ANNA: bucket counts pair by pair as oracle, the frequency of its guarantee, its limit of many tables, its cost."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import count_flops
from attnlens.attention import anna, build
from attnlens.attention.anna import Anna, expected_mean, expected_weights
from attnlens.linalg.hashing import line_collision
from attnlens.testing.inputs import EXACT, gaussian
from attnlens.testing.theory import log_log_slope

CAUSAL = pytest.mark.parametrize("causal", [False, True])


def operator(seed=0, **overrides):
    config = OmegaConf.load("conf/attention/anna.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=128, seed=seed, **overrides).double()


def loop_attention(q, k, v, op, causal):
    """Tables as dictionaries from tuples of cells to (sum, count), read before or after each token."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    of_queries, of_keys = (
        ((x @ op.directions + op.offsets[:, None]) / op.width).floor().long().unflatten(-1, (op.num_tables, -1))
        for x in (q, k)
    )
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            sums = [{} for _ in range(op.num_tables)]
            for i in range(q.shape[2]):
                new = [i] if causal else range(k.shape[2]) if i == 0 else []
                for j in new:
                    for r, table in enumerate(sums):
                        key = tuple(of_keys[b, h, j, r].tolist())
                        total, count = table.get(key, (0, 0))
                        table[key] = total + v[b, h, j], count + 1
                hit = [table.get(tuple(of_queries[b, h, i, r].tolist()), (0, 0)) for r, table in enumerate(sums)]
                number = sum(count for _, count in hit)
                if number:
                    out[b, h, i] = sum(total for total, _ in hit) / number
    return out


@CAUSAL
@pytest.mark.parametrize(("length", "tables", "functions", "width"), [(1, 2, 1, 4.0), (7, 1, 3, 9.0), (20, 5, 2, 5.0)])
def test_equals_dictionaries_of_buckets_forward_and_backward(length, tables, functions, width, causal):
    """Buckets are constants: values alone receive a gradient other than zero."""
    op = operator(num_tables=tables, num_functions=functions, width=width)
    q, k, v = (x.requires_grad_() for x in gaussian(length, value_dim=5))
    direction = torch.randn(2, 2, length, 5, dtype=torch.float64)
    found, expected = op(q, k, v, causal=causal), loop_attention(q, k, v, op, causal)
    assert torch.allclose(found, expected, atol=EXACT)
    if not expected.requires_grad:
        assert length == 1
        return
    of_q, of_v = torch.autograd.grad(found, (q, v), direction)
    assert torch.allclose(of_v, torch.autograd.grad(expected, v, direction)[0], atol=EXACT)
    assert (of_q == 0).all()


@CAUSAL
def test_tables_in_small_portions_and_rows_in_blocks_change_nothing(monkeypatch, causal):
    q, k, v = gaussian(30)
    op = operator(num_tables=7)
    seen = {"causal": causal, "key_padding_mask": None}
    whole, limit = op(q, k, v, causal=causal), expected_mean(q, k, v, 4.0, 2, **seen)
    monkeypatch.setattr(anna, "IN_FLIGHT", 5000)
    monkeypatch.setattr(anna, "ROWS", 7)
    assert torch.allclose(op(q, k, v, causal=causal), whole, atol=EXACT)
    assert torch.allclose(expected_mean(q, k, v, 4.0, 2, **seen), limit, atol=EXACT)


@CAUSAL
def test_rows_sum_to_one_or_are_empty_and_give_zero(causal):
    """Where no bucket holds a key the output is zero, not a mean over far keys."""
    op = operator(num_tables=2, num_functions=6, width=3.0)
    q, k, v = gaussian(40)
    weights = op.matrix(q, k, causal=causal)
    total = weights.sum(-1)
    assert weights.min() >= 0
    assert ((total - 1).abs().lt(EXACT) | (total == 0)).all()
    empty = total == 0
    assert 0.05 < empty.double().mean() < 0.95
    assert (op(q, k, v, causal=causal)[empty] == 0).all()
    assert not Anna.row_stochastic


def clusters():
    """Eight centers at distances of 42, a query and five keys within 1/2 of each."""
    generator = torch.Generator().manual_seed(5)
    centers = 30 * torch.eye(8, dtype=torch.float64)

    def around(count):
        shift = torch.randn(8, count, 8, generator=generator, dtype=torch.float64)
        shift = shift / shift.norm(dim=-1, keepdim=True) * torch.rand(8, count, 1, generator=generator).double() / 2
        return (centers[:, None] + shift).flatten(0, 1)[None, None]

    return around(1), around(5)


RADIUS, FACTOR = 0.7, 55.0


@pytest.mark.parametrize(("tables", "functions", "width"), [(4, 6, 12.0), (6, 5, 6.0), (8, 4, 8.0)])
def test_the_guarantee_fails_no_more_often_than_its_bound(tables, functions, width):
    """1000 operators in one (its heads): the frequency of a far meeting or a missed neighbor, and in all other draws
    w_ij = 0 beyond c r and w_ij >= 1/((|N(q_i, c r)| - 1) l + 1) within r."""
    draws = 1000
    op = Anna(tables, functions, width, head_dim=8, num_heads=draws, seed=0).double()
    q, k = (x.expand(1, draws, -1, -1) for x in clusters())
    distance = torch.cdist(q[0, 0], k[0, 0])
    near, far = distance <= RADIUS, distance > FACTOR * RADIUS
    assert (near | far).all()
    weights = op.matrix(q, k)[0]
    failed = ((weights > 0) & far).flatten(1).any(-1) | ((weights == 0) & near).flatten(1).any(-1)
    bound = op.failure_bound(RADIUS, FACTOR, int(near.sum()), int(far.sum()))
    share = failed.double().mean().item()
    assert 0 < share <= bound + 5 * math.sqrt(bound / draws)
    assert bound < 1
    least = 1 / ((near.sum(-1, keepdim=True) - 1) * tables + 1).double()
    kept = weights[~failed]
    assert (kept[:, far] == 0).all()
    assert (kept >= least * (1 - EXACT))[:, near].all()


def test_the_bound_can_be_made_as_small_as_one_likes():
    op = Anna(60, 10, 8.0, head_dim=8, num_heads=1, seed=0)
    assert op.failure_bound(RADIUS, FACTOR, 40, 280) < 1e-3
    assert op.failure_bound(RADIUS, 1.5, 40, 280) > 1


def test_every_pair_meets_with_its_own_probability():
    """P(C_ij > 0) = 1 - (1 - p^K)^l within five standard errors of 4000 draws."""
    draws, tables, functions, width = 4000, 3, 2, 5.0
    op = Anna(tables, functions, width, head_dim=8, num_heads=draws, seed=1).double()
    q, k, _ = (x[:1, :1].expand(-1, draws, -1, -1) for x in gaussian(6))
    share = (op.kernel(q, k)[0] > 0).double().mean(0)
    p = line_collision(torch.cdist(q[0, 0], k[0, 0]), width)
    expected = 1 - (1 - p**functions) ** tables
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


@CAUSAL
def test_many_tables_lead_to_the_kernel_smoother_at_order_one_half(causal):
    q, k, v = gaussian(24)
    limit = expected_mean(q, k, v, 6.0, 2, causal=causal, key_padding_mask=None)
    budgets, errors = (32, 128, 512), []
    for budget in budgets:
        draws = [operator(seed=s, num_tables=budget, width=6.0, num_functions=2) for s in range(12)]
        errors.append(sum((op(q, k, v, causal=causal) - limit).square().sum().item() for op in draws) ** 0.5)
    assert abs(log_log_slope(budgets, errors) + 0.5) < 0.1
    weights = expected_weights(q, k, 6.0, 2)
    weights = weights.tril() if causal else weights
    assert torch.allclose(limit, weights / weights.sum(-1, keepdim=True) @ v, atol=EXACT)


@CAUSAL
def test_straight_through_has_the_gradient_of_the_limit(causal):
    inputs = [x.requires_grad_() for x in gaussian(9)]
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    real = mask[:, None, :, None]
    direction = torch.randn(2, 2, 9, 8, dtype=torch.float64) * real
    passed = operator(straight_through=True)
    out = passed(*inputs, causal=causal, key_padding_mask=mask)
    assert torch.allclose(out, operator()(*inputs, causal=causal, key_padding_mask=mask), atol=EXACT)
    weights = line_collision((inputs[0][..., :, None, :] - inputs[1][..., None, :, :]).norm(dim=-1), passed.width)
    weights = weights.pow(passed.num_functions) * mask[:, None, None]
    weights = weights.tril() if causal else weights
    limit = weights @ inputs[2] / weights.sum(-1, keepdim=True)
    pairs = (torch.autograd.grad(x, inputs, direction) for x in (out, limit))
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in zip(*pairs, strict=True))


def test_equal_queries_and_keys_have_finite_gradients():
    x = gaussian(9)[0].requires_grad_()
    operator(straight_through=True)(x, x, x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_common_shift_of_cells_and_points_changes_nothing():
    """Distances count, not angles: moving q and k by one vector that the offsets undo leaves every bucket as it was."""
    q, k, v = gaussian(20)
    op = operator()
    before, shift = op(q, k, v), torch.full((8,), 3.0, dtype=torch.float64)
    op.offsets = op.offsets - shift @ op.directions
    assert torch.allclose(op(q + shift, k + shift, v), before, atol=EXACT)


@pytest.mark.parametrize(("causal", "limit"), [(False, 1.06), (True, 1.2)])
def test_cost_grows_with_the_length_times_its_logarithm(causal, limit):
    """Fixed tables: exponent 1 but for the sort, and for the passes of the segmented sums where causal."""
    op = Anna(4, 4, 8.0, head_dim=64, num_heads=1, seed=0)
    lengths = (512, 1024, 2048, 4096)
    flops = []
    for n in lengths:
        q, k, v = (torch.randn(1, 1, n, 64, generator=torch.Generator().manual_seed(0)) for _ in range(3))
        flops.append(float(count_flops(lambda q, k, v: op(q, k, v, causal=causal), q, k, v)))
    slope = log_log_slope(lengths, flops)
    assert 1 <= slope < limit


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_tables": 0}, "`num_tables` must be at least 1, got 0"),
        ({"num_functions": 0}, "`num_functions` must be at least 1, got 0"),
        ({"width": 0.0}, "`width` must be above 0, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        operator(**overrides)
