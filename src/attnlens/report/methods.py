"""What each method of a study declares about itself, as its results carry it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Declarations of one operator; `arguments` are those of its yaml, `summary` its module's first sentence."""

    name: str
    family: str
    target: str
    budget: str | None
    causal: bool
    row_stochastic: bool
    order: float | None
    arguments: str
    summary: str


def methods_of(approximate: Mapping[str, Mapping]) -> list[Method]:
    """The methods of a study from its results/approximate/<attention>.json."""
    return [Method(name=name, **result["declared"]) for name, result in approximate.items()]
