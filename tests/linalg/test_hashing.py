"""Hyperplane codes: the Gray order, and the collision probability that the theory gives."""

import itertools
import math

import torch

from attnlens.linalg.hashing import gray_position, hyperplane_code


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
