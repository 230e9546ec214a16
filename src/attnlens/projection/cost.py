"""What a projection costs by formula: multiply-adds of its matrix products, floats of its cache and of its weights.

A multiply-add is two FLOPs. Left out is what is no matrix product: softmax, norms, rotations, scalings, biases.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """Width of the tokens d, number of heads H, width of a head d_head; H d_head need not be d."""

    width: int
    num_heads: int
    head_dim: int


class Cost(NamedTuple):
    """Of one layer and sequence.

    maps: multiply-adds from tokens to queries, keys and values, or to what stands for them.
    scores: of queries with keys, and what only they need.
    means: of weights with values, and what only they need.
    final: of the heads' outputs to one.
    cache: floats a token, under exact attention that keeps everything.
    weights: floats of the projection's parameters, without biases and short convolutions.
    """

    maps: int
    scores: int
    means: int
    final: int
    cache: int
    weights: int

    @property
    def products(self) -> int:
        """Multiply-adds in all."""
        return self.maps + self.scores + self.means + self.final


def grouped_cost(shape: Shape, num_groups: int, *, new: int, past: int) -> Cost:
    """Attention with a key and a value for each of G groups, G = H for multi-head attention.

    maps N d d_head (H + 2 G), scores and means N M H d_head each, final N H d_head d; cache 2 G d_head.
    """
    d, heads, e = shape
    pairs = new * (past + new)
    weights = d * e * (heads + 2 * num_groups)
    final = heads * e * d
    return Cost(new * weights, pairs * heads * e, pairs * heads * e, new * final, 2 * num_groups * e, weights + final)
