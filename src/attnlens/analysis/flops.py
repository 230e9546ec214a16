"""Count the floating point operations of one forward, on real tensors, whatever the method.

Torch's FlopCounterMode counts matrix products and convolutions and takes everything else for free: fused attention on
a CPU, matrix-vector products, FFTs, factorizations, sorts, gathers, exponentials. Budgets of forty methods cannot be
compared so; here every operator that reaches the dispatcher is charged by the table of `unit_costs`. Counts are taken
on real tensors, since the shapes inside hashing and clustering depend on the data.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnlens.analysis import unit_costs


class UnknownOperatorWarning(UserWarning):
    """An operator without a unit cost took part in a count, which is too low by what it costs."""


class FlopCount(NamedTuple):
    """FLOPs of a call, in all and by operator, the score pairs that fused attention visited, and unknown operators."""

    flops: int
    visited: int
    by_operator: dict[str, float]
    unknown: tuple[str, ...]


class FlopCounter(TorchDispatchMode):
    """Adds up the cost of every operator under it; operators inside autograd functions included."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: defaultdict[str, float] = defaultdict(float)
        self.visited = 0
        self.unknown: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch would import its whole compiler (over a second) only to keep it away from this mode.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001 (torch's signature)
        packet = func.overloadpacket
        decomposes = packet.__name__ not in unit_costs.FORMULAS and packet not in unit_costs.flop_registry
        if decomposes and not func.is_view:
            # Under inference_mode composite operators arrive whole: count what they are made of.
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self._charge(func, _bind(func, args, kwargs or {}), out)
        return out

    def _charge(self, func: torch._ops.OpOverload, arguments: unit_costs.Arguments, out: object) -> None:
        name = func.overloadpacket.__name__
        if name in unit_costs.FREE:
            return
        flops = unit_costs.cost(func, arguments, out)
        if flops is None:
            self.unknown.add(str(func.overloadpacket))
            return
        self.by_operator[name] += flops
        self.visited += unit_costs.visited_pairs(arguments) if name in unit_costs.FUSED else 0


def _bind(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict[str, object]:
    """Arguments by the names of the operator's schema, in its order, those left out at their default."""
    bound: dict[str, object] = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.is_out:
            continue
        default = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = args[position] if position < len(args) else kwargs.get(argument.name, default)
    return bound


def measure_flops(function: Callable[..., object], *tensors: Tensor | None) -> FlopCount:
    """Count one call of `function` on the first example of each tensor (batch first; None is passed on)."""
    single = [None if tensor is None else tensor[:1] for tensor in tensors]
    counter = FlopCounter()
    with torch.no_grad(), counter:
        function(*single)
    total = math.ceil(sum(counter.by_operator.values()))
    return FlopCount(total, counter.visited, dict(counter.by_operator), tuple(sorted(counter.unknown)))


def count_flops(function: Callable[..., object], *tensors: Tensor | None) -> int:
    """FLOPs of one call of `function` at batch 1; warns of operators that have no unit cost."""
    count = measure_flops(function, *tensors)
    if count.unknown:
        warnings.warn(
            f"no unit cost for {', '.join(count.unknown)}, so the count of {count.flops} is too low; "
            "add a formula to attnlens/analysis/unit_costs.py",
            UnknownOperatorWarning,
            stacklevel=2,
        )
    return count.flops
