"""The weights of a model as one stack of equal matrices, and back.

A layer's matrices are cut into slices of width x s rows or columns, s the greatest common size: with a feed-forward
network of four times the width, as in BERT, every layer has 12 slices of width x width; SmolLM2 (576, keys and values
192, network 1536) has 32 of 576 x 192.
"""

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.conversion.base import linears, multihead
from attnlens.models.base import AbstractStack


class Slices(NamedTuple):
    """stack: all slices, (layers, slices a layer, width, s). size: s."""

    stack: Tensor
    size: int


def slices(model: AbstractStack) -> Slices:
    """All slices of attention's and the network's matrices, in the order of `matrices`.

    Raises:
        ValueError: a matrix without a side of the model's width, or layers of unequal sizes.
    """
    size = _size(model)
    sizes = [sum(matrix.numel() for matrix, _ in matrices(model, layer)) for layer in range(len(model.layers))]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"`model` has layers of {sorted(set(sizes))} weights, whose slices make no one stack: give a model "
            "of equal layers"
        )
    layers = [
        torch.cat([_cut(matrix, size, width) for matrix, width in matrices(model, layer)])
        for layer in range(len(model.layers))
    ]
    return Slices(torch.stack(layers), size)


def with_slices(model: AbstractStack, stack: Float[Tensor, "l s w r"]) -> AbstractStack:
    """A copy of the model with these slices for its weights."""
    clone = copy.deepcopy(model)
    size = _size(model)
    with torch.no_grad():
        for layer, rows in enumerate(stack):
            place = 0
            for matrix, width in matrices(clone, layer):
                number = matrix.numel() // (size * width)
                _paste(matrix, rows[place : place + number], width)
                place += number
            assert place == len(rows), "a slice for every place"
    return clone


def matrices(model: AbstractStack, layer: int) -> Iterator[tuple[Tensor, int]]:
    """The weights of one layer that are sliced, and the model's width."""
    block = model.layers[layer]
    projection = multihead(block)
    networks = [] if block.mlp is None else [m for m in block.mlp.modules() if isinstance(m, nn.Linear)]
    for linear in (*linears(projection), projection.output, *networks):
        yield linear.weight, projection.width


def _size(model: AbstractStack) -> int:
    others = []
    for matrix, width in matrices(model, 0):
        if width not in matrix.shape:
            raise ValueError(
                f"`model` has a matrix of {tuple(matrix.shape)}, no side of which is its width {width}: its weights "
                "make no equal slices"
            )
        others.append(matrix.numel() // width)
    return math.gcd(*others)


def _cut(matrix: Tensor, size: int, width: int) -> Float[Tensor, "s w r"]:
    """Columns of x W for maps from the width, rows for maps to it, each as width x size."""
    tall = matrix.detach().T if matrix.shape[1] == width else matrix.detach()
    return tall.unflatten(1, (-1, size)).transpose(0, 1)


def _paste(matrix: Tensor, rows: Float[Tensor, "s w r"], width: int) -> None:
    tall = rows.transpose(0, 1).flatten(1)
    matrix.copy_(tall.T if matrix.shape[1] == width else tall)
