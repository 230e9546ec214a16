"""Configs to objects, in one way: `_target_` names the class, the caller offers what only it knows.

`hydra.utils.instantiate` gives nested objects nothing, hands lists over as ListConfig and reports an unknown keyword
from deep inside; this is the same idea with those three mended.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf


def construct(config: Mapping | DictConfig, offered: Mapping[str, object] | None = None, **overrides: object) -> Any:
    """Build what `config["_target_"]` names.

    Arguments of the constructor come from `config`, then from `overrides`. Of `offered` it receives those names that
    its signature holds. Nested mappings with a `_target_` are built in the same way with the same offer. A value
    in `offered` may be a function of the nesting path (marked by `PerPath`), so that two nested parts differ.

    Raises:
        ValueError: unknown keyword, `_partial_` or an offered name written in the config, or a missing `_target_`;
            the message lists what is valid.
    """
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    assert isinstance(plain, dict)
    return _construct(plain, offered or {}, overrides, path=())


class PerPath:
    """An offered value that depends on where in the config it is asked for, e.g. the seed of a nested operator."""

    def __init__(self, function: Callable[[tuple[str, ...]], object]) -> None:
        self.function = function


def _construct(config: Mapping, offered: Mapping[str, object], overrides: Mapping, path: tuple[str, ...]) -> Any:
    if "_target_" not in config:
        raise ValueError(f"`_target_` is missing from {dict(config)!r}: name the class to build")
    target = get_class(config["_target_"])
    # A class without a constructor of its own shows the `*args, **kwargs` of its base: those are not names.
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {name for name, value in inspect.signature(target).parameters.items() if value.kind in named}
    written = {name: value for name, value in config.items() if name != "_target_"}
    valid = sorted(parameters - set(offered))
    for name in (*written, *overrides):
        if name in offered:
            raise ValueError(
                f"`{name}` is passed by the caller and cannot be set for {target.__name__}; valid: {valid}"
            )
        if name not in parameters:
            raise ValueError(f"`{name}` is not an argument of {target.__name__}; valid: {valid}")
    arguments = {**written, **overrides}
    for name, value in arguments.items():
        if isinstance(value, Mapping) and "_target_" in value:
            arguments[name] = _construct(value, offered, {}, (*path, name))
    for name, value in offered.items():
        if name in parameters:
            arguments[name] = value.function(path) if isinstance(value, PerPath) else value
    return target(**arguments)
