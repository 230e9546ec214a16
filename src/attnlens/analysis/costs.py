"""The formulas of `projection.cost` beside what a built layer counts: matrix products, cache and parameters.

Products are counted with scores and means written out (`Dense`), since a fused kernel charges for a softmax too and, on
a CPU, for values padded to the width of the keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.analysis.flops import measure_flops
from attnlens.attention.base import AbstractAttention
from attnlens.cache.full import Full
from attnlens.linalg.dense import softmax_naive
from attnlens.projection.base import AbstractProjection

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Dense(AbstractAttention):
    """Softmax attention by its definition."""

    family = "exact"
    row_stochastic = True
    caches = True

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return softmax_naive(q, k, v, causal=causal, key_padding_mask=key_padding_mask)


class Counted(NamedTuple):
    """Of a built layer: multiply-adds of one run over n tokens, cached floats a token, parameters."""

    products: int
    cache: int
    weights: int


def counted_products(function: Callable[..., object], *tensors: Tensor) -> int:
    """Multiply-adds of the matrix products in one call."""
    found = measure_flops(function, *tensors).by_operator
    return round(sum(found.get(name, 0) for name in PRODUCTS)) // 2


def counted(layer: AbstractProjection, x: Float[Tensor, "1 n w"]) -> Counted:
    """Count a layer around `Dense` on one sequence."""
    with torch.no_grad():
        cache, _ = layer.step(layer.init_cache(1, x.shape[1]), x)
    held = Full().num_bytes(cache.state) // (x.element_size() * x.shape[1])
    weights = sum(weight.numel() for weight in layer.parameters())
    return Counted(counted_products(lambda x: layer(x), x), held, weights)
