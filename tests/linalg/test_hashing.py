"""Codes: the Gray order, the collision probability that theory gives each family; sums by code against pairs."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from attnlens.linalg.hashing import (
    causal_table_sums,
    fused_code,
    gray_position,
    hyperplane_code,
    line_cells,
    line_collision,
    polytope_buckets,
    segment_sums,
    shared_ids,
    table_sums,
)


def test_gray_positions_are_a_permutation_in_which_neighbors_differ_in_one_bit():
    patterns = torch.tensor(list(itertools.product([False, True], repeat=5)))
    position = gray_position(patterns)
    assert sorted(position.tolist()) == list(range(32))
    walk = patterns[position.argsort()]
    assert (walk[1:] != walk[:-1]).sum(-1).eq(1).all()


def test_collision_probability_is_that_of_the_angle():
    """P(equal codes) = (1 - angle/pi)^p for hyperplanes, in 20000 draws within five standard errors."""
    generator, draws, bits = torch.Generator().manual_seed(0), 20000, 3
    planes = torch.randn(draws, 2, bits, generator=generator, dtype=torch.float64)
    for angle in (0.2, 1.0, 2.5):
        x = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        codes = hyperplane_code(x.expand(1, draws, 2, 2), planes)
        share = (codes[..., 0] == codes[..., 1]).double().mean().item()
        expected = (1 - angle / math.pi) ** bits
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)


def test_codes_ignore_the_norm_and_carry_no_gradient():
    x = torch.randn(1, 2, 9, 4, requires_grad=True)
    planes = torch.randn(2, 4, 6)
    code = hyperplane_code(x, planes)
    assert torch.equal(code, hyperplane_code(7 * x, planes))
    assert code.min() >= 0
    assert code.max() < 64
    assert not code.requires_grad


def shares(codes):
    """How often the code of each vector is that of the first, over draws."""
    return (codes == codes[:, :1]).double().mean(0)


def on_circle(angles):
    angles = torch.tensor(angles, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin(), torch.zeros_like(angles)], -1)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_polytope_collisions_fall_with_the_angle_to_one_in_2k_at_a_right_one(k):
    """Over 40000 draws: monotone, 1/(2 k) within five standard errors if orthogonal, never for x and -x."""
    draws = 40000
    rotations = torch.randn(draws, 3, 1, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = on_circle([0.0, 0.3, 0.8, 1.2, math.pi / 2, 2.0, math.pi])
    codes = polytope_buckets(x.expand(1, draws, 7, 3), rotations)[0, :, 0]
    share = shares(codes)
    assert share[0] == 1
    assert share[-1] == 0
    assert (share[1:] < share[:-1]).all()
    right = 1 / (2 * k)
    assert abs(share[4] - right) < 5 * math.sqrt(right * (1 - right) / draws)
    assert codes.min() == 0
    assert codes.max() == 2 * k - 1


def test_one_polytope_direction_is_a_hyperplane():
    """k = 1: P(equal) = 1 - angle/pi, within five standard errors of 40000 draws."""
    draws, angles = 40000, [0.0, 0.4, 1.1, 2.6]
    rotations = torch.randn(draws, 3, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = shares(polytope_buckets(on_circle(angles).expand(1, draws, 4, 3), rotations)[0, :, 0])
    for found, angle in zip(share.tolist()[1:], angles[1:], strict=True):
        p = 1 - angle / math.pi
        assert abs(found - p) < 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_line_collisions_are_those_of_the_distance(width):
    """p(u) in 40000 draws within five standard errors, wherever the two points lie."""
    draws = 40000
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(draws, 3, 1, generator=generator, dtype=torch.float64)
    offsets = width * torch.rand(draws, 1, generator=generator, dtype=torch.float64)
    distance = torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64)
    x = torch.tensor([7.0, -2.0, 1.0], dtype=torch.float64) + distance[:, None] * on_circle([0.7])
    share = shares(line_cells(x.expand(1, draws, 6, 3), directions, offsets, width)[0, :, :, 0])
    p = line_collision(distance, width)
    assert share[0] == p[0] == 1
    assert ((share - p).abs()[1:] < 5 * (p * (1 - p) / draws).sqrt()[1:]).all()


def test_line_collision_is_the_integral_over_the_offset():
    """p(u) = int_0^r (1 - t / r) 2 phi(t / u) / u dt: the gap is half-normal, the border falls in it or not."""
    width = 1.7
    for u in (0.02, 0.3, 1.0, 5.0, 40.0):
        expected, _ = quad(lambda t, u=u: (1 - t / width) * 2 * norm.pdf(t / u) / u, 0, min(width, 40 * u))
        assert line_collision(torch.tensor(u, dtype=torch.float64), width).item() == pytest.approx(expected, abs=1e-10)


def test_line_collision_falls_and_has_its_slope_at_zero():
    u = torch.linspace(0, 9, 400, dtype=torch.float64, requires_grad=True)
    p = line_collision(u, 2.0)
    assert (p[1:] < p[:-1]).all()
    (slope,) = torch.autograd.grad(p.sum(), u)
    assert slope[0].item() == pytest.approx(-math.sqrt(2 / math.pi) / 2.0)
    assert torch.autograd.gradcheck(lambda x: line_collision(x, 2.0), u[1::40].detach().requires_grad_())


def test_all_codes_carry_no_gradient():
    x = torch.randn(1, 2, 9, 4, requires_grad=True)
    assert not polytope_buckets(x, torch.randn(2, 4, 3, 5)).requires_grad
    assert not line_cells(x, torch.randn(2, 4, 5), torch.rand(2, 5), 1.0).requires_grad


def test_fused_codes_are_equal_where_tuples_are():
    """All 9^4 tuples of entries -4 .. 4 get numbers of their own."""
    tuples = torch.cartesian_prod(*[torch.arange(-4, 5)] * 4)
    multipliers = torch.randint(-(2**63), 2**63 - 1, (4,), generator=torch.Generator().manual_seed(0))
    codes = fused_code(tuples, multipliers)
    assert len(codes.unique()) == 9**4
    assert torch.equal(codes, fused_code(tuples.clone(), multipliers))


def test_shared_ids_keep_equality_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    of_queries, of_keys = (torch.randint(-4, 5, (2, 3, n), generator=generator) * 2**59 for n in (11, 7))
    ids, key_ids = shared_ids(of_queries, of_keys)
    assert torch.equal(ids[..., :, None] == key_ids[..., None, :], of_queries[..., :, None] == of_keys[..., None, :])
    assert torch.equal(key_ids[..., :, None] == key_ids[..., None, :], of_keys[..., :, None] == of_keys[..., None, :])
    assert key_ids.min() >= 0
    assert key_ids.max() < 7
    assert torch.equal(ids == 7, ~(of_queries[..., :, None] == of_keys[..., None, :]).any(-1))


def random_codes(n, m=None):
    generator = torch.Generator().manual_seed(3)
    of_queries, of_keys = (torch.randint(5, (2, 2, 3, x), generator=generator) for x in (n, m or n))
    return of_queries, of_keys, torch.randn(2, 2, m or n, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_sums_by_code_are_the_sums_over_pairs_forward_and_backward(n):
    of_queries, of_keys, v = random_codes(n)
    v.requires_grad_()
    equal = (of_queries[..., :, None] == of_keys[..., None, :]).double()
    direction = torch.randn(2, 2, n, 4, dtype=torch.float64)
    for found, weights in (
        (table_sums(of_queries, of_keys, v, 5), equal),
        (causal_table_sums(of_queries, of_keys, v), equal.tril()),
    ):
        expected = (weights @ v[:, :, None]).sum(2)
        assert torch.allclose(found, expected, atol=1e-12)
        pair = (torch.autograd.grad(x, v, direction)[0] for x in (found, expected))
        assert torch.allclose(*pair, atol=1e-12)


def test_sums_by_code_with_more_keys_than_queries():
    of_queries, of_keys, v = random_codes(6, 13)
    equal = (of_queries[..., :, None] == of_keys[..., None, :]).double()
    assert torch.allclose(table_sums(of_queries, of_keys, v, 5), (equal @ v[:, :, None]).sum(2), atol=1e-12)


def test_segment_sums_start_anew():
    segment = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3, 3, 9])
    x = torch.arange(1.0, 11.0, dtype=torch.float64)[:, None]
    assert segment_sums(x, segment)[:, 0].tolist() == [1, 3, 6, 4, 5, 11, 18, 26, 35, 10]


def test_a_huge_value_of_the_future_does_not_reach_the_past():
    """Running sums over all keys, subtracted at the borders of a bucket, mix 1e18 of a later token in another bucket
    into earlier rows, and an infinite value turns them into NaN; sums that start anew do neither."""
    of_keys = torch.tensor([[[[1, 1, 1, 0]]]])
    for last in (1e18, math.inf):
        v = torch.tensor([1.0, 2.0, 3.0, last], dtype=torch.float64)
        assert causal_table_sums(of_keys, of_keys, v.view(1, 1, 4, 1)).flatten().tolist() == [1, 3, 6, last]
        running = v[[3, 0, 1, 2]].cumsum(0)
        assert (running[1:] - running[0]).tolist() != [1, 3, 6]
