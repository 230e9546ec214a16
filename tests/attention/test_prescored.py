"""Prescored: softmax over chosen keys as oracle, what it wraps, its bound, and what the choice costs."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import count_flops
from attnlens.attention import build
from attnlens.attention.hyperattention import HyperAttention
from attnlens.attention.linear import Linear
from attnlens.attention.prescored import Prescored
from attnlens.attention.smyrf import Smyrf
from attnlens.attention.softmax import Softmax, softmax_naive, softmax_weights
from attnlens.linalg.key_selection import KMeans, KMedian, Leverage
from attnlens.testing import CONTRACT
from attnlens.testing.inputs import EXACT, gaussian

HEADS = {"head_dim": 8, "num_heads": 2, "seed": 0}
RULES = {"k-means": KMeans, "k-median": KMedian}


def rule(name, **heads):
    return Leverage() if name == "leverage" else RULES[name](**{**HEADS, **heads})


def hyper(**overrides):
    arguments = {"block_size": 4, "num_planes": 4, "max_length": 128, "sort_queries": False, **HEADS}
    return HyperAttention(**{**arguments, **overrides}).double()


@pytest.mark.parametrize("selection", ["k-means", "k-median", "leverage"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_softmax_with_the_other_keys_hidden_forward_and_backward(selection, masked):
    op = Prescored(6, Softmax(), rule(selection)).double()
    inputs = [x.requires_grad_() for x in gaussian(25, value_dim=5)]
    mask = torch.rand(2, 25, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    k = inputs[1].detach() if mask is None else torch.where(mask[:, None, :, None], inputs[1].detach(), 0)
    chosen, filled = op.choose(k, mask)
    shown = torch.zeros(2, 2, 25, dtype=torch.bool).scatter(-1, chosen, True)
    assert filled is None or filled.all()
    scores = (inputs[0] @ inputs[1].mT * 8**-0.5).masked_fill(~shown[:, :, None], -torch.inf)
    expected, found = torch.softmax(scores, -1) @ inputs[2], op(*inputs, key_padding_mask=mask)
    assert torch.allclose(found, expected, atol=EXACT)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


@pytest.mark.parametrize("operator", [lambda: Softmax(), lambda: Linear(), hyper], ids=["softmax", "linear", "hyper"])
def test_with_every_key_it_is_the_operator(operator):
    inner = operator()
    inputs = gaussian(20)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    for padding in (None, mask):
        found = Prescored(20, inner, Leverage())(*inputs, key_padding_mask=padding)
        assert torch.equal(found, inner(*inputs, key_padding_mask=padding))


def test_hyperattention_of_the_paper_runs_where_queries_are_not_sorted():
    """Its equal blocks need equal lengths; placed by their own codes queries may be more than keys."""
    inputs = gaussian(70, logit_scale=0.3)
    with pytest.raises(ValueError, match=r"`operator` must take more queries than keys.*sort_queries: false"):
        Prescored(16, hyper(sort_queries=True), Leverage())
    with pytest.raises(ValueError, match="got Smyrf"):
        Prescored(16, Smyrf(8, 1, **HEADS), Leverage())
    op = Prescored(16, hyper(), rule("k-means")).double()
    full = Prescored(16, hyper(block_size=16), rule("k-means")).double()
    few = Prescored(16, Softmax(), rule("k-means")).double()
    assert torch.allclose(full(*inputs), few(*inputs), atol=EXACT)
    assert not torch.allclose(op(*inputs), few(*inputs), atol=1e-3)


def test_the_contract_holds_with_another_operator_inside():
    config = OmegaConf.load("conf/attention/prescored.yaml")
    config.operator = {"_target_": "attnlens.attention.hyperattention.HyperAttention"}
    config.operator.update({"block_size": 4, "num_planes": 4, "sort_queries": False})

    def factory(**arguments):
        return build(config, **arguments)

    for name in ("shapes", "examples_do_not_mix", "padding_is_never_read", "nan_query_stays_in_its_row"):
        assert CONTRACT[name](factory) is None
    assert CONTRACT["constant_values"](factory) is None


def test_what_is_declared_is_that_of_the_operator():
    assert Prescored(4, Softmax(), Leverage()).row_stochastic
    assert Prescored(4, Linear(), Leverage()).target == Linear.target
    q, k, v = gaussian(9)
    linear = Linear()
    assert Prescored(4, linear, Leverage()).error_bound(q, k, v) is None
    assert torch.equal(Prescored(4, linear, Leverage()).reference(q, k, v), linear.reference(q, k, v))


def test_the_bound_is_the_softmax_mass_left_out_times_the_diameter():
    q, k, v = gaussian(30)
    op = Prescored(7, Softmax(), Leverage()).double()
    chosen, _ = op.choose(k, None)
    dropped = softmax_weights(q, k).scatter(-1, chosen[:, :, None].expand(-1, -1, 30, -1), 0).sum(-1)
    bound = op.error_bound(q, k, v)
    assert torch.allclose(bound, dropped * torch.cdist(v, v).amax((-2, -1))[..., None], rtol=1e-10)
    assert ((op(q, k, v) - softmax_naive(q, k, v)).norm(dim=-1) <= bound).all()


def test_leverage_finds_heavy_keys():
    """Keys that alone span the directions of all the mass; k-means finds 4 to 8 of them, k-median one."""
    n, generator = 96, torch.Generator().manual_seed(5)
    q, k, v = gaussian(n)
    heavy = torch.randperm(n, generator=generator)[:8]
    q, k = 4 * q, 0.1 * k
    k[:, :, heavy] = 6 * torch.eye(8, dtype=torch.float64)
    exact = softmax_naive(q, k, v)
    error = (Prescored(12, Softmax(), Leverage()).double()(q, k, v) - exact).norm()
    rest = torch.tensor([j for j in range(n) if j not in set(heavy.tolist())])
    others = softmax_naive(q, k[:, :, rest], v[:, :, rest])
    assert error < 0.2 * (others - exact).norm()
    chosen = Prescored(12, Softmax(), Leverage()).double().choose(k, None)[0]
    assert all(set(heavy.tolist()) <= set(chosen[b, h].tolist()) for b in range(2) for h in range(2))


@pytest.mark.parametrize("selection", ["k-means", "k-median", "leverage"])
def test_cost_is_linear_in_the_length_at_fixed_budget(selection):
    flops = []
    for n in (512, 1024, 2048):
        op = Prescored(32, Softmax(), rule(selection, head_dim=32))
        flops.append(count_flops(op, *(x.float() for x in gaussian(n, batch=1, head_dim=32))))
    assert abs(math.log(flops[-1] / flops[0]) / math.log(4) - 1) < 0.06


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`num_keys` must be at least 1, got 0"):
        Prescored(0, Softmax(), Leverage())
    with pytest.raises(ValueError, match="`iterations` must be at least 1, got 0"):
        KMeans(**HEADS, iterations=0)
    with pytest.raises(ValueError, match="reads all tokens at once"):
        Prescored(4, Softmax(), Leverage())(*gaussian(9), causal=True)
