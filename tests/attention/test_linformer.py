"""Linformer: the formula with any projection, its exact forms, learned parameters, the draw that never converges."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import count_flops
from attnlens.attention import build
from attnlens.attention.linformer import Linformer
from attnlens.attention.softmax import softmax_naive
from attnlens.linalg.length_projection import JohnsonLindenstrauss, Learned, Pooled, segment_matrix
from attnlens.testing.inputs import HEADS, gaussian

SIZE = {"head_dim": 8, "num_heads": HEADS, "max_length": 32}


def config(projection, **arguments):
    nested = {"_target_": f"attnlens.linalg.length_projection.{projection.__name__}"}
    return {"_target_": "attnlens.attention.linformer.Linformer", "projection": nested, **arguments}


def randomized(num_keys):
    """Learned matrices away from their start."""
    operator = build(config(Learned, num_keys=num_keys), **SIZE).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return operator


def formula(q, k, v, of_keys, of_values, bias=0.0):
    return torch.softmax(q @ (of_keys @ k).mT * q.shape[-1] ** -0.5 + bias, -1) @ (of_values @ v)


def test_equals_the_formula_forward_and_backward_parameters_included():
    tensors = [x.requires_grad_() for x in gaussian(20, value_dim=5)]
    operator = randomized(6)
    tensors += [operator.projection.keys, operator.projection.values]
    found = operator(*tensors[:3])
    expected = formula(*tensors[:3], tensors[3][..., :20], tensors[4][..., :20])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * cotangent).sum(), tensors),
        torch.autograd.grad((expected * cotangent).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_pooling_is_the_formula_with_segment_sizes_and_gives_the_mean_for_equal_keys():
    q, k, v = gaussian(22, value_dim=5)
    operator = Linformer(6)
    member = (segment_matrix(6, 22) > 0).double()
    sizes = member.sum(-1)
    matrix = member / sizes[:, None]
    expected = formula(q, k, v, matrix, matrix, sizes.log())
    torch.testing.assert_close(operator(q, k, v), expected, atol=1e-12, rtol=0)
    equal = k[:, :, :1].expand_as(k)
    torch.testing.assert_close(operator(q, equal, v), v.mean(2, keepdim=True).expand(2, 2, 22, 5), atol=1e-12, rtol=0)
    weights = operator.matrix(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-12, rtol=0)
    assert (weights >= 0).all()


def test_identity_matrices_are_softmax():
    q, k, v = gaussian(32)
    operator = randomized(32)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.copy_(torch.eye(32).expand_as(parameter))
    torch.testing.assert_close(operator(q, k, v), softmax_naive(q, k, v), atol=1e-12, rtol=0)
    started = build(config(Learned, num_keys=32), **SIZE).double()
    torch.testing.assert_close(started(q, k, v), softmax_naive(q, k, v), atol=1e-12, rtol=0)


def test_learned_matrices_are_parameters_that_training_improves():
    """Skyformer's copy of Linformer keeps its matrix out of the parameters: not moved, not saved, not trained."""
    q, k, v = gaussian(32, batch=8)
    exact = softmax_naive(q, k, v)
    operator = build(config(Learned, num_keys=8), **SIZE).double()
    assert sum(x.numel() for x in operator.parameters()) == 2 * HEADS * 8 * 32
    assert set(operator.state_dict()) == {"projection.keys", "projection.values"}
    optimizer = torch.optim.Adam(operator.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (operator(q, k, v) - exact).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not list(build(config(Pooled, num_keys=8), **SIZE).parameters())


def test_random_projections_do_not_converge():
    """At 16 and at 1024 keys the error of the draw stays above that of mean(V); pooling is exact from 32 on."""
    q, k, v = gaussian(32)
    exact = softmax_naive(q, k, v)
    null = (v.mean(2, keepdim=True) - exact).norm()
    for num_keys in (16, 1024):
        draws = [build(config(JohnsonLindenstrauss, num_keys=num_keys), **SIZE, seed=s).double() for s in range(8)]
        assert all((operator(q, k, v) - exact).norm() > null for operator in draws)
    assert Linformer.order is None
    torch.testing.assert_close(Linformer(1024)(q, k, v), exact, atol=1e-12, rtol=0)


def test_layers_and_seeds_draw_differently():
    q, k, v = gaussian(20, dtype=torch.float32)
    settings = ({}, {"layer": 1}, {"seed": 1})
    outs = [build(config(JohnsonLindenstrauss, num_keys=4), **SIZE, **s)(q, k, v) for s in settings]
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_more_queries_than_keys_and_causal_is_refused():
    q, k, v = gaussian(20)
    for projection in (Pooled, Learned, JohnsonLindenstrauss):
        operator = build(config(projection, num_keys=4), **SIZE).double()
        torch.testing.assert_close(operator(q[:, :, :3], k, v), operator(q, k, v)[:, :, :3], atol=1e-12, rtol=0)
        with pytest.raises(ValueError, match="`causal=True`"):
            operator(q, k, v, causal=True)


def test_the_counter_knows_every_operator_and_few_keys_cost_less():
    q, k, v = gaussian(32, batch=1, dtype=torch.float32)
    mask = torch.arange(32)[None] < 20
    for projection in (Pooled, Learned, JohnsonLindenstrauss):
        few, many = (build(config(projection, num_keys=r), **SIZE) for r in (2, 8))
        assert count_flops(few, q, k, v) < count_flops(many, q, k, v)
        count_flops(lambda *x, few=few: few(*x[:3], key_padding_mask=x[3]), q, k, v, mask)


def test_the_config_and_bad_values():
    written = OmegaConf.load("conf/attention/linformer.yaml")
    assert isinstance(build(written, **SIZE).projection, Learned)
    assert isinstance(Linformer(4).projection, Pooled)
    with pytest.raises(ValueError, match="`num_keys`"):
        build(written, **SIZE, num_keys=0)
