"""What conversions share: a copy of a model whose layers have other projections, or other weights."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.models.base import AbstractStack
from attnlens.models.block import AbstractBlock
from attnlens.projection.base import AbstractProjection
from attnlens.projection.multihead import AbstractMultiHead


class Converted(NamedTuple):
    """The new model and what it keeps.

    parameters: of the weights that the conversion replaced, over those before (1.0: as many).
    cache: floats that decoding keeps a token and layer.
    """

    model: AbstractStack
    parameters: float
    cache: int


def with_projections(
    model: AbstractStack, change: Callable[[int, AbstractMultiHead], AbstractProjection]
) -> AbstractStack:
    """A copy of the model in which `change(layer, projection)` stands in the place of each projection.

    `change` gets the copy's projections: operators and positions that it hands on are not shared with `model`.

    Raises:
        ValueError: a projection without query, key and value heads of its own, packed or convolved.
    """
    for block in model.layers:
        multihead(block)
    clone = copy.deepcopy(model)
    for layer, block in enumerate(clone.layers):
        block.projection = change(layer, multihead(block)).eval()
    return clone


def multihead(block: AbstractBlock) -> AbstractMultiHead:
    """The block's projection, if a conversion can read it.

    Raises:
        ValueError: it is of another kind, packed or convolved.
    """
    projection = block.projection
    if not isinstance(projection, AbstractMultiHead) or len(projection.inputs) != 3 or projection.convolutions:
        raise ValueError(
            f"`model` has a {type(projection).__name__} that cannot be converted: give one of multi-head or "
            "grouped-query attention with separate maps and no short convolution"
        )
    return projection


def linears(projection: AbstractMultiHead) -> list[nn.Linear]:
    """The maps to queries, keys and values."""
    return [linear for linear in projection.inputs if isinstance(linear, nn.Linear)]


def heads(linear: nn.Linear, number: int) -> Float[Tensor, "h w d"]:
    """W_h of each head, tokens on the left: x W_h."""
    return linear.weight.detach().T.unflatten(1, (number, -1)).transpose(0, 1)


def put(linear: nn.Linear, weight: Float[Tensor, "o i"], bias: Tensor | None = None) -> None:
    """Make these the weights of a map of the same shape."""
    assert linear.weight.shape == weight.shape, (linear.weight.shape, weight.shape)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if linear.bias is not None and bias is not None:
            linear.bias.copy_(bias)


def count(modules: Sequence[nn.Module]) -> int:
    """Weights of modules, an operator's left out."""
    return sum(
        weight.numel() for module in modules for name, weight in module.named_parameters() if "attention." not in name
    )


@torch.no_grad()
def inputs(model: AbstractStack, ids: Int[Tensor, "b n"]) -> list[Float[Tensor, "r w"]]:
    """What the projection of each layer reads on these tokens, one row a token."""
    found, x = [], model.embed(ids)
    for block in model.layers:
        found.append(block.before(0, x).flatten(0, 1))
        x = block(x, causal=model.causal)
    return found


def ranked(rank: int, largest: int, what: str) -> int:
    """`rank` if it is one.

    Raises:
        ValueError: below 1 or above `largest`.
    """
    if not 1 <= rank <= largest:
        raise ValueError(f"`rank` must be between 1 and {largest}, {what}, got {rank}")
    return rank
