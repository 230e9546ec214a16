"""Counts against counts by hand."""

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from attnlens.analysis.flops import UnknownOperatorWarning, count_flops, measure_flops
from attnlens.attention import build

CONF = Path(__file__).parents[2] / "conf" / "attention"
OPERATORS = [path.stem for path in sorted(CONF.glob("*.yaml"))]
EXP, DIVISION = 8, 4
PAIR = 4 + EXP


def operands(length, dim=16, heads=2, batch=3, value_dim=None):
    generator = torch.Generator().manual_seed(0)
    sizes = (dim, dim, value_dim or dim)
    return [torch.randn(batch, heads, length, size, generator=generator) for size in sizes]


def operator_cost(name, length, causal=False, **overrides):
    q, k, v = operands(length)
    config = OmegaConf.load(CONF / f"{name}.yaml")
    operator = build(config, head_dim=16, num_heads=2, max_length=length, **overrides)
    return count_flops(lambda q, k, v: operator(q, k, v, causal=causal), q, k, v)


def test_fused_attention_counts_pairs_of_one_example():
    q, k, v = operands(40)
    expected = 2 * (40 * 40 * (2 * 16 + 2 * 16 + PAIR) + 40 * (DIVISION + 16))
    assert count_flops(F.scaled_dot_product_attention, q, k, v) == expected


@pytest.mark.parametrize("length", [1, 2, 33])
def test_causal_attention_counts_the_triangle(length):
    q, k, v = operands(length)
    count = measure_flops(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
    assert count.visited == 2 * length * (length + 1) // 2
    assert count.flops == count.visited * (4 * 16 + PAIR) + 2 * length * (DIVISION + 16)


def test_an_additive_mask_counts_the_pairs_it_leaves():
    q, k, v = operands(20)
    mask = torch.zeros(20, 20).masked_fill(torch.arange(20) >= 7, -math.inf)
    mask[0] = torch.finfo(mask.dtype).min
    count = measure_flops(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), q, k, v)
    assert count.visited == 2 * 19 * 7


def test_causal_attention_with_more_keys_than_queries_counts_the_upper_left():
    q, k, v = operands(9)
    call = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)  # noqa: E731
    assert measure_flops(call, q[:, :, :5], k, v).visited == 2 * (1 + 2 + 3 + 4 + 5)


def test_naive_softmax_attention():
    q, k, v = operands(24, value_dim=8)
    count = count_flops(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, q, k, v)
    assert count == 2 * 24 * 24 * (2 * 16 + 2 * 8 + PAIR)


def test_linear_attention_by_hand():
    def linear(q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return (q @ (k.mT @ v)) / (q @ k.sum(-2)[..., None])

    q, k, v = operands(24)
    features = 2 * 24 * 16 * (EXP + 1)
    products = 2 * 2 * 24 * 16 * 16 + 2 * 24 * 16
    expected = 2 * (features + products + 24 * 16 + 24 * 16 * DIVISION)
    assert count_flops(linear, q, k, v) == expected


def test_window_visits_its_band():
    """|i - j| < w: n (2 w - 1) - w (w - 1) pairs; blocks may visit more, but not twice as many."""
    band = 2 * (256 * 7 - 4 * 3)
    cost = operator_cost("window", 256, window=4)
    assert band * (4 * 16 + PAIR) <= cost <= 2 * band * (4 * 16 + PAIR)


@pytest.mark.parametrize(
    ("name", "causal", "slope"), [("softmax", False, 2), ("softmax", True, 2), ("linear", False, 1)]
)
def test_scaling_exponent(name, causal, slope):
    low, high = operator_cost(name, 512, causal), operator_cost(name, 2048, causal)
    assert math.log(high / low, 4) == pytest.approx(slope, abs=0.03)


def test_causal_linear_attention_is_linear_beyond_its_chunk():
    low, high = operator_cost("linear", 1024, causal=True), operator_cost("linear", 4096, causal=True)
    assert math.log(high / low, 4) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: torch.mv(x[0, 0], x[0, 0, 0]), 2 * 8 * 8),
        (lambda x: torch.dot(x[0, 0, 0], x[0, 0, 0]), 2 * 8),
        (lambda x: torch.addmm(x[0, 0], x[0, 0], x[0, 0]), 2 * 8**3),
        (lambda x: torch.fft.fft(x.to(torch.complex64)), 64 * 2 * 5 * 3),
        (lambda x: torch.fft.rfft(x), 64 * 2 * 2.5 * 3),
        (lambda x: torch.fft.irfft(torch.fft.rfft(x), n=8), 2 * 64 * 2 * 2.5 * 3),
        (lambda x: torch.linalg.cholesky(torch.eye(8)), math.ceil(8**3 / 3)),
        (lambda x: torch.linalg.solve(x[0, 0], x[0, 0]), math.ceil(2 * 8**3 / 3 + 2 * 8**3)),
        (lambda x: torch.linalg.solve_triangular(x, x, upper=True), 2 * 8**3),
        (lambda x: torch.linalg.qr(x[..., :3]), 2 * math.floor(4 * 8 * 9 - 4 * 27 / 3)),
        (lambda x: torch.linalg.svd(x), 2 * 22 * 8**3),
        (lambda x: torch.ops.aten._linalg_svd(x, compute_uv=False), math.ceil(2 * (4 - 4 / 3) * 8**3)),
        (lambda x: torch.sort(x), 128 * 3),
        (lambda x: x.argsort(1), 128 * 1),
        (lambda x: x.topk(2), 128 * 3),
        (lambda x: x.gather(2, torch.zeros(1, 2, 5, 8, dtype=torch.long)), 2 * 5 * 8),
        (lambda x: x[:, :, torch.tensor([0, 3])], 2 * 2 * 8),
        (lambda x: x.index_add(2, torch.tensor([1]), x[:, :, :1]), 2 * 8),
        (lambda x: x.exp(), 128 * EXP),
        (lambda x: x.logsumexp(-1), 128 * (EXP + 3)),
        (lambda x: x * x + x, 2 * 128),
        (lambda x: x.mul_(2).exp_(), 128 * (1 + EXP)),
        (lambda x: x / 3, 128 * DIVISION),
        (lambda x: x**2, 128),
        (lambda x: x**x, 128 * EXP),
        (lambda x: torch.complex(x, x) * torch.complex(x, x), 6 * 128),
        (lambda x: x.to(torch.complex64) @ x.to(torch.complex64), 8 * 2 * 8**3),
        (lambda x: x.sum(-1), 128),
        (lambda x: x.transpose(1, 2).reshape(1, 8, 16)[:, :3].clone().contiguous().double(), 0),
        (lambda x: torch.cat([x, torch.zeros(1, 2, 1, 8)], 2), 0),
    ],
)
def test_unit_costs(function, expected):
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert count_flops(function, x) == expected


def test_operators_inside_an_autograd_function_are_counted():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    assert count_flops(Double.apply, torch.ones(1, 7, requires_grad=True)) == 7


def test_matrix_products_agree_with_torch():
    q, k, v = operands(24)
    with FlopCounterMode(display=False) as counter:
        torch.einsum("bhnd,bhmd->bhnm", q[:1], k[:1]) @ v[:1]
    count = measure_flops(lambda q, k, v: torch.einsum("bhnd,bhmd->bhnm", q, k) @ v, q, k, v)
    assert count.flops == counter.get_total_flops()


def test_inference_mode_counts_the_same():
    q, k, v = operands(24)
    function = lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v  # noqa: E731
    expected = count_flops(function, q, k, v)
    with torch.inference_mode():
        assert count_flops(function, q, k, v) == expected


def test_a_product_in_place_costs_what_the_other_costs():
    """torch registers `baddbmm` alone: a causal `performer` once counted a third of its products as nothing."""
    added, a, b = torch.ones(2, 3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    plain = count_flops(torch.baddbmm, added, a, b)
    assert plain == 2 * 3 * 4 * 5
    assert count_flops(lambda x, a, b: x.baddbmm_(a, b), added, a, b) == plain


def test_an_unknown_operator_is_reported_not_free():
    with pytest.warns(UnknownOperatorWarning, match="linalg_ldl_factor"):
        count_flops(lambda x: torch.linalg.ldl_factor(x), torch.eye(3)[None])


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_made_of_known_operators(name):
    q, k, v = operands(32)
    config = OmegaConf.load(CONF / f"{name}.yaml")
    operator = build(config, head_dim=16, num_heads=2, max_length=32)
    k, v = (x.repeat(1, 1, 1, operator.arity) for x in (k, v))
    mask = torch.arange(32) < torch.tensor([[32], [20], [3]])
    for causal in {False, operator.causal}:
        count = measure_flops(lambda q, k, v, m: operator(q, k, v, causal=causal, key_padding_mask=m), q, k, v, mask)  # noqa: B023
        assert count.unknown == ()
        assert count.flops > 0
