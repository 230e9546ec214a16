"""What each method of a study declares about itself, as its results carry it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Declarations of one operator; `arguments` are its yaml's, `summary` its module's first sentence."""

    name: str
    family: str
    target: str
    budget: str | None
    causal: bool
    row_stochastic: bool
    order: float | None
    arguments: str
    summary: str
    slope: str


def methods_of(approximate: Mapping[str, Mapping], converge: Mapping[str, Mapping]) -> list[Method]:
    """The methods of a study from its results/approximate/<attention>.json and results/converge/<attention>.json."""
    return [
        Method(name=name, **result["declared"], slope=slopes(converge[name])) for name, result in approximate.items()
    ]


def slopes(result: Mapping) -> str:
    """The fitted slope with its standard error and what it is of, or a dash."""
    found = result["slope"]
    if found is None:
        return "–"
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.2f}"
    return f"{found['slope']:.2f}{error} ({found['of']})"
