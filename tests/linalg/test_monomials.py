"""Monomials: how many, multiplicative, and their weighted sum is the truncated exponential of a multilinear form."""

import math

import pytest
import torch

from attnlens.linalg.monomials import evaluate, monomials, num_monomials
from attnlens.testing.inputs import gaussian


@pytest.mark.parametrize(("dim", "degree"), [(1, 0), (1, 5), (3, 1), (4, 3), (8, 4)])
def test_number_product_and_kernel(dim, degree):
    x, y, z = (t[0, 0] for t in gaussian(6, head_dim=dim))
    recipe = monomials(dim, degree)
    f_x, f_y, f_z = (evaluate(t, recipe) for t in (x, y, z))
    assert f_x.shape == (6, num_monomials(dim, degree)) == (6, len(recipe.coefficient))
    torch.testing.assert_close(f_x * f_y, evaluate(x * y, recipe), atol=1e-10, rtol=1e-10)
    form = (x * y * z).sum(-1)
    series = sum(form**r / math.factorial(r) for r in range(degree + 1))
    torch.testing.assert_close((recipe.coefficient * f_x * f_y * f_z).sum(-1), series, atol=1e-10, rtol=1e-10)


def test_no_monomial_twice():
    values = evaluate(torch.tensor([[2.0, 3.0, 5.0]], dtype=torch.float64), monomials(3, 4))[0]
    assert len(values.unique()) == len(values) == 35
