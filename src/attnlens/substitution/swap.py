"""Blocks with another projection, for as long as it takes to look."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.models.base import AbstractStack
from attnlens.projection.base import AbstractProjection
from attnlens.substitution.subject import Batch


def with_operator(projection: AbstractProjection, operator: AbstractAttention) -> AbstractProjection:
    """A copy of the projection, weights included, around another operator."""
    clone = copy.deepcopy(projection)
    clone.attention = copy.deepcopy(operator)
    return clone


@contextmanager
def substituted(model: AbstractStack, projections: Mapping[int, AbstractProjection]) -> Iterator[AbstractStack]:
    """The model with other projections in the layers that `projections` names; as it was afterwards."""
    kept = {layer: model.layers[layer].projection for layer in projections}
    try:
        for layer, projection in projections.items():
            model.layers[layer].projection = projection
        yield model
    finally:
        for layer, projection in kept.items():
            model.layers[layer].projection = projection


@torch.no_grad()
def residuals(model: AbstractStack, batch: Batch) -> list[Float[Tensor, "b n w"]]:
    """What each block reads in the exact model, and last what follows them all."""
    found = [model.embed(batch.input_ids)]
    for block in model.layers:
        found.append(block(found[-1], causal=model.causal, key_padding_mask=batch.mask))
    return found


@torch.no_grad()
def run_from(model: AbstractStack, x: Float[Tensor, "b n w"], layer: int, mask: Bool[Tensor, "b n"] | None) -> Tensor:
    """The model's output, given what block `layer` reads: a change in it costs no layer before it."""
    for block in model.layers[layer:]:
        x = block(x, causal=model.causal, key_padding_mask=mask)
    return model.finish(x, key_padding_mask=mask)


def counts(num_layers: int) -> Sequence[int]:
    """Numbers of layers to replace at once: powers of two, and all."""
    powers = [2**power for power in range(num_layers.bit_length()) if 2**power < num_layers]
    return [*powers, num_layers]
