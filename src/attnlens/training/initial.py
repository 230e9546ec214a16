"""Weights to begin with: those of an earlier model with equal body, whatever its head."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


class Initial(NamedTuple):
    """What became of the tensors of a file.

    loaded: names of the model's tensors that come from it.
    new: names of those that do not, all of them in a head.
    """

    loaded: tuple[str, ...]
    new: tuple[str, ...]


def initial_file(path: Path | str, seed: int) -> Path:
    """The weights that `path` names: a file, the folder of a seed, or that of a cell, which has a folder for `seed`.

    Raises:
        ValueError: there are none.
    """
    path = Path(path)
    for found in (path, path / "model.safetensors", path / f"seed{seed}" / "model.safetensors"):
        if found.is_file():
            return found
    seeds = sorted(folder.parent.name for folder in path.glob("seed*/model.safetensors"))
    raise ValueError(
        f"`training.initial` is {path}, which holds no model.safetensors for seed {seed} (there: {seeds}): train that "
        "cell first, or name a file of weights"
    )


def load_initial(model: nn.Module, file: Path) -> Initial:
    """Put every tensor of `file` into `model` in place that has the name and shape of one there.

    Raises:
        ValueError: a damaged file, or one that lacks a tensor of the body or has it in another shape.
    """
    try:
        found = load_file(str(file))
    except SafetensorError as error:
        raise ValueError(f"`training.initial` {file} is damaged, or no file of weights: {error}") from error
    own = model.state_dict()
    new = [name for name, tensor in own.items() if name not in found or found[name].shape != tensor.shape]
    wrong = [
        f"{name} {tuple(own[name].shape)} (there: {tuple(found[name].shape) if name in found else 'none'})"
        for name in new
        if "head" not in name.split(".")
    ]
    left = sorted(name for name in found if name not in own and "head" not in name.split("."))
    if wrong or left:
        raise ValueError(
            f"`training.initial` {file} is of another model: it does not fit {wrong[:4]} and its {left[:4]} have no "
            "place; build the model with the options that it was trained with"
        )
    loaded = tuple(name for name in own if name not in new)
    model.load_state_dict({name: found[name] for name in loaded}, strict=False)
    return Initial(loaded, tuple(new))
