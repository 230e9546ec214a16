"""Tensors of a file into a module: each has its place, each place its tensor, and nothing is initialized first."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.attention.softmax import Softmax

Operators = Callable[[int], AbstractAttention]


def exact(layer: int) -> AbstractAttention:
    """What the models were trained with."""
    return Softmax()


def assign(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Make `tensors` the parameters of `model`, which may live on the meta device; operators keep their own.

    Raises:
        ValueError: tensors that are missing, left over or of another shape; the message names `origin`.
    """
    wanted = {name: weight.shape for name, weight in model.named_parameters() if ".attention." not in name}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & tensors.keys() if wanted[name] != tensors[name].shape)
    if missing or extra or wrong:
        shapes = [f"{name} {tuple(tensors[name].shape)}, not {tuple(wanted[name])}" for name in wrong]
        raise ValueError(
            f"`{origin}` is not a file of this model: missing {missing[:5]}, left over {extra[:5]}, of another shape "
            f"{shapes[:5]}; fetch it again, or load it with the code of its own architecture"
        )
    model.load_state_dict(dict(tensors), strict=False, assign=True)


def finished(model: nn.Module) -> None:
    """Freeze, and see that nothing was left on the meta device."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    left = [name for name, tensor in model.state_dict().items() if tensor.device == torch.device("meta")]
    assert not left, f"without values: {left}"
    model.eval()
