"""What each method of a study declares about itself, read from its class."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


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


def declared(folder: Path, names: Iterable[str]) -> list[Method]:
    """The declarations of the operators that `folder`/<name>.yaml name."""
    return [_declared(folder / f"{name}.yaml", name) for name in names]


def _declared(path: Path, name: str) -> Method:
    import inspect
    import sys

    import yaml
    from hydra.utils import get_class

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    operator = get_class(config.pop("_target_"))
    text = inspect.getdoc(sys.modules[operator.__module__]) or ""
    return Method(
        name=name,
        family=operator.family,
        target=operator.target,
        budget=operator.budget,
        causal=operator.causal,
        row_stochastic=operator.row_stochastic,
        order=operator.order,
        arguments=_arguments(config),
        summary=" ".join(text.split("\n\n")[0].split()),
    )


def _arguments(config: Mapping[str, object]) -> str:
    """Arguments as a call would have them; a nested operator by the name of its class."""
    return ", ".join(f"{name}={_argument(value)}" for name, value in sorted(config.items()) if name != "_target_")


def _argument(value: object) -> str:
    if isinstance(value, Mapping) and "_target_" in value:
        return f"{str(value['_target_']).rpartition('.')[2]}({_arguments(value)})"
    return str(value)
