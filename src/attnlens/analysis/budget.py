"""Find the budget argument at which an operator costs a given fraction of exact attention.

"128 features each" is not an equal budget: a landmark, a feature and a window key cost different amounts. Methods are
compared at equal counted FLOPs (`flops.count_flops`), as fractions of exact attention under the same mask.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.analysis.flops import count_flops
from attnlens.attention.base import AbstractAttention
from attnlens.attention.softmax import Softmax

TOLERANCE = 0.1


class Match(NamedTuple):
    """The argument closest to a budget (None: the operator has no such argument), what it costs, and the fraction.

    `reachable`: the cost is within 10 % of the budget. Arguments that step (a window, a power of two) may miss it.
    """

    argument: int | None
    flops: int
    achieved: float
    reachable: bool


def operator_flops(
    operator: AbstractAttention,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> int:
    """FLOPs of one forward on the first example, all heads."""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return operator(q, k, v, causal=causal, key_padding_mask=mask)

    return count_flops(forward, q, k, v, key_padding_mask)


def exact_flops(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> int:
    """FLOPs of fused exact attention under the same mask, on the first example, all heads."""
    return operator_flops(Softmax(), q, k, v, causal=causal, key_padding_mask=key_padding_mask)


def match_budgets(
    cost: Callable[[int], int | None], exact: int, fractions: Sequence[float], longest: int
) -> list[Match]:
    """The argument in 1..longest whose cost is nearest to each fraction of `exact`.

    Args:
        cost: FLOPs at an argument, growing with it, or None where the operator does not admit the argument
            (say, it takes powers of two only). Called once an argument at most.
        exact: FLOPs of exact attention.
        fractions: the ladder.
        longest: the largest argument worth trying.

    Raises:
        ValueError: no argument in 1..longest is admissible.
    """
    known: dict[int, int | None] = {}

    def cached(argument: int) -> int | None:
        if argument not in known:
            known[argument] = cost(argument)
        return known[argument]

    return [_match(cached, fraction, exact, longest) for fraction in fractions]


def _match(cost: Callable[[int], int | None], fraction: float, exact: int, longest: int) -> Match:
    target = fraction * exact
    low, high = _bracket(cost, target, longest)
    while high - low > 1:
        middle = _admissible_between(cost, low, high)
        if middle is None:
            break
        low, high = (middle, high) if _known(cost, middle) <= target else (low, middle)
    # Counts need not be strictly monotone (blocks, rounding): look one admissible step beyond the bracket as well.
    around = {low, high, *_neighbours(cost, low, high, longest)}
    argument = min(sorted(around), key=lambda a: abs(_known(cost, a) - target))
    flops = _known(cost, argument)
    achieved = flops / exact
    return Match(argument, flops, achieved, abs(achieved / fraction - 1) <= TOLERANCE)


def _known(cost: Callable[[int], int | None], argument: int) -> int:
    flops = cost(argument)
    assert flops is not None, f"argument {argument} is not admissible"
    return flops


def _bracket(cost: Callable[[int], int | None], target: float, longest: int) -> tuple[int, int]:
    """Admissible arguments around the target: powers of two first, every integer where those are not admitted."""
    doubling = [2**power for power in range(longest.bit_length())]
    below = None
    for candidates in (doubling, range(1, longest + 1)):
        for argument in candidates:
            flops = cost(argument)
            if flops is None:
                continue
            if flops > target:
                return (argument if below is None else below, argument)
            below = argument
        if below is not None:
            last = next(a for a in range(longest, 0, -1) if cost(a) is not None)
            return below, max(last, below)
    raise ValueError(f"`budget`: no argument in 1..{longest} is admissible; check the operator's own limits")


def _admissible_between(cost: Callable[[int], int | None], low: int, high: int) -> int | None:
    """The admissible argument strictly between that is nearest to the middle, or None."""
    middle = (low + high) // 2
    inside = sorted(range(low + 1, high), key=lambda argument: (abs(argument - middle), argument))
    return next((argument for argument in inside if cost(argument) is not None), None)


def _neighbours(cost: Callable[[int], int | None], low: int, high: int, longest: int) -> list[int]:
    beyond = [low - 1] if low > 1 else []
    beyond += [high + 1] if high < longest else []
    return [argument for argument in beyond if cost(argument) is not None]


def ladder(
    construct: Callable[[int], AbstractAttention],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
    fractions: Sequence[float],
) -> list[Match]:
    """`match_budgets` for an operator that `construct` builds at an argument, on these tensors.

    A ValueError at construction or in the forward means that the argument is not admissible.
    """
    count = partial(operator_flops, q=q, k=k, v=v, causal=causal, key_padding_mask=key_padding_mask)

    def cost(argument: int) -> int | None:
        try:
            return count(construct(argument))
        except ValueError:
            return None

    exact = exact_flops(q, k, v, causal=causal, key_padding_mask=key_padding_mask)
    return match_budgets(cost, exact, fractions, longest=4 * k.shape[2])
