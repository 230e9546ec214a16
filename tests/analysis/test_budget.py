"""The search finds what a scan of every argument finds."""

import pytest
import torch

from attnlens.analysis.budget import ladder, match_budgets
from attnlens.attention.random_keys import RandomKeys

LADDER = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def scan(cost, exact, fraction, longest):
    admissible = [a for a in range(1, longest + 1) if cost(a) is not None]
    return min(admissible, key=lambda a: (abs(cost(a) - fraction * exact), a))


COSTS = {
    "proportional": lambda a: 100 + 31 * a,
    "quadratic": lambda a: 5 * a * a,
    "steps": lambda a: 700 * -(-a // 16),
    "powers of two": lambda a: 40 * a if a & (a - 1) == 0 else None,
    "multiples of three": lambda a: 40 * a if a % 3 == 0 else None,
    "divisors of 105": lambda a: 40 * a if 105 % a == 0 and a > 1 else None,
    "saturated": lambda a: min(40 * a, 1500),
    "too dear": lambda a: 9000 + a,
    "at least five": lambda a: 40 * a if a >= 5 else None,
}


@pytest.mark.parametrize("name", COSTS)
def test_search_equals_scan(name):
    cost = COSTS[name]
    for match, fraction in zip(match_budgets(cost, 6400, LADDER, 128), LADDER, strict=True):
        best = scan(cost, 6400, fraction, 128)
        assert abs(match.flops - fraction * 6400) == abs(cost(best) - fraction * 6400)
        assert match.flops == cost(match.argument)
        assert match.achieved == match.flops / 6400
        assert match.reachable == (abs(match.flops / (fraction * 6400) - 1) <= 0.1)


def test_each_argument_is_counted_once_and_few_are():
    seen = []
    match_budgets(lambda a: seen.append(a) or 31 * a, 128 * 1024, LADDER, 4096)
    assert len(seen) == len(set(seen)) < 80


def test_nothing_admissible_is_an_error():
    with pytest.raises(ValueError, match=r"no argument in 1\.\.16 is admissible"):
        match_budgets(lambda a: None, 100, LADDER, 16)


@pytest.mark.parametrize("causal", [False, True])
def test_ladder_on_an_operator(causal):
    q, k, v = torch.randn(3, 2, 2, 128, 16, generator=torch.Generator().manual_seed(0))
    matches = ladder(
        lambda keys: RandomKeys(keys, max_length=128, seed=0),
        q,
        k,
        v,
        causal=causal,
        key_padding_mask=None,
        fractions=LADDER,
    )
    arguments = [match.argument for match in matches]
    assert arguments == sorted(set(arguments))
    assert all(match.reachable for match in matches[1:])


def test_a_value_error_means_not_admissible():
    def construct(argument):
        if argument % 2:
            raise ValueError("`num_keys` must be even")
        return RandomKeys(argument, max_length=32, seed=0)

    q, k, v = torch.randn(3, 1, 1, 32, 8, generator=torch.Generator().manual_seed(0))
    matches = ladder(construct, q, k, v, causal=False, key_padding_mask=None, fractions=LADDER)
    assert all(match.argument % 2 == 0 for match in matches)
