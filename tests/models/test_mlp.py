"""Gated networks against torch's formulas."""

import pytest
import torch
import torch.nn.functional as F

from attnlens.models.build import seeded
from attnlens.models.mlp import GATES, GluMlp, SwigluMlp

FORMULAS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * torch.distributions.Normal(0.0, 1.0).cdf(x),
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_is_its_formula(activation, bias):
    mlp, x = GluMlp(6, activation, expansion=2, bias=bias), torch.randn(2, 5, 6)
    hidden = FORMULAS[activation](F.linear(x, mlp.gate.weight, mlp.gate.bias)) * mlp.inner(x)
    torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.outer.weight, mlp.outer.bias))
    assert hidden.shape[-1] == 12
    assert all((part.bias is not None) == bias for part in (mlp.gate, mlp.inner, mlp.outer))


def test_the_sigmoid_gate_is_the_glu_of_torch():
    mlp, x = GluMlp(4, "sigmoid", expansion=1), torch.randn(1, 3, 4)
    both = torch.cat([mlp.inner(x), mlp.gate(x)], -1)
    torch.testing.assert_close(mlp(x), mlp.outer(F.glu(both)))


def test_swiglu_is_the_silu_gate_to_the_bit_and_keeps_its_weights():
    with seeded(3):
        named = SwigluMlp(6)
    with seeded(3):
        general = GluMlp(6)
    assert list(named.state_dict()) == ["gate.weight", "inner.weight", "outer.weight"]
    x = torch.randn(2, 5, 6)
    expected = F.linear(F.silu(named.gate(x)) * named.inner(x), named.outer.weight)
    assert torch.equal(named(x), expected)
    assert torch.equal(general(x), expected)
    assert named.gate.weight.shape == (16, 6)


def test_an_unknown_gate_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"`activation` is 'tanh': choose one of \['silu'"):
        GluMlp(4, "tanh")
