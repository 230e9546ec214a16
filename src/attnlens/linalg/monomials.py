"""All monomials of bounded degree: the features of a polynomial kernel that are multiplicative.

    psi_a(x) = prod_c x_c^{a_c},   |a| <= p,   psi(x * y) = psi(x) * psi(y) entry by entry,

C(d + p, p) of them. With c_a = prod_c 1/a_c! the truncated exponential of a multilinear form is one sum over them,

    sum_{r <= p} (sum_c x_c y_c ...)^r / r! = sum_a c_a psi_a(x) psi_a(y) ...

Random features and sketches of a kernel are not multiplicative: at x * y they are no product of values at x and y.
"""

import math
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Monomials(NamedTuple):
    """How each monomial is made: `parent` is that of one degree less, `last` the coordinate it is multiplied by.

    `coefficient` is c_a; `starts` the first monomial of every degree 1, 2, ..., p, and their number.
    """

    parent: Int[Tensor, " m"]
    last: Int[Tensor, " m"]
    coefficient: Float[Tensor, " m"]
    starts: tuple[int, ...]


def num_monomials(dim: int, degree: int) -> int:
    """C(d + p, p)."""
    return math.comb(dim + degree, degree)


def monomials(dim: int, degree: int) -> Monomials:
    """The recipe for the monomials of at most `degree` in `dim` variables, the constant first."""
    place: dict[tuple[int, ...], int] = {(): 0}
    parent, last, coefficient, starts = [0], [0], [1.0], []
    for size in range(1, degree + 1):
        starts.append(len(parent))
        for word in combinations_with_replacement(range(dim), size):
            place[word] = len(parent)
            parent.append(place[word[:-1]])
            last.append(word[-1])
            # a! of the word: times the exponent that its last letter reaches.
            coefficient.append(coefficient[parent[-1]] / word.count(word[-1]))
    coefficients = torch.tensor(coefficient, dtype=torch.float64, device="cpu")
    parents, letters = (torch.tensor(index, dtype=torch.long, device="cpu") for index in (parent, last))
    return Monomials(parents, letters, coefficients, (*starts, len(parent)))


def evaluate(x: Float[Tensor, "*batch d"], recipe: Monomials) -> Float[Tensor, "*batch m"]:
    """psi(x), degree by degree, one product each."""
    parts, before = [torch.ones_like(x[..., :1])], 0
    for start, stop in zip(recipe.starts, recipe.starts[1:], strict=False):
        own = slice(start, stop)
        parts.append(parts[-1][..., recipe.parent[own] - before] * x[..., recipe.last[own]])
        before = start
    return torch.cat(parts, -1)
