"""What an operator declares about itself, as plain values: results carry it, so that a reader needs no code."""

import inspect
import sys
from collections.abc import Mapping

from attnlens.attention import AbstractAttention


def declarations(config: Mapping, operator: AbstractAttention) -> dict[str, object]:
    """Family, target, budget argument, order and the rest of the class; its module's first sentence; its arguments."""
    text = inspect.getdoc(sys.modules[type(operator).__module__]) or ""
    return {
        "family": operator.family,
        "target": operator.target,
        "budget": operator.budget,
        "causal": operator.causal,
        "row_stochastic": operator.row_stochastic,
        "order": operator.order,
        "arguments": arguments(config),
        "summary": " ".join(text.split("\n\n")[0].split()),
    }


def is_learned(operator: AbstractAttention) -> bool:
    """Whether training changes the operator; it then keeps the weights and the budget it was trained with."""
    return any(True for _ in operator.parameters())


def is_randomized(operator: AbstractAttention) -> bool:
    """Whether the operator draws: its constructor names `seed`."""
    return "seed" in inspect.signature(type(operator)).parameters


def arguments(config: Mapping) -> str:
    """Arguments as a call would have them; a nested part by the name of its class."""
    return ", ".join(f"{name}={_argument(value)}" for name, value in sorted(config.items()) if name != "_target_")


def _argument(value: object) -> str:
    if isinstance(value, Mapping) and "_target_" in value:
        return f"{str(value['_target_']).rpartition('.')[2]}({arguments(value)})"
    return str(value)
