"""Skeinformer against its steps with every matrix formed, and its draws against Monte Carlo."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.skeinformer import Skeinformer, log_importance
from attnlens.attention.softmax import softmax_naive, softmax_weights


def inputs(length, *, scale=1.0, value_dim=5, head_dim=8, batch=2):
    generator = torch.Generator().manual_seed(length)
    widths = (head_dim, head_dim, value_dim)
    q, k, v = (torch.randn(batch, 2, length, w, generator=generator, dtype=torch.float64) for w in widths)
    return [x.requires_grad_() for x in (q * scale, k * scale, v)]


def operator(num_samples, **overrides):
    config = OmegaConf.load("conf/attention/skeinformer.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=128, num_samples=num_samples, **overrides).double()


def one_head(q, k, v, pilots, columns):
    """Steps 3 and 4 of one head by the row, with the geometric mean taken as a geometric mean."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    a, others = scores.exp(), [j for j in range(k.shape[0]) if j not in set(columns.tolist())]
    mean = a[:, columns].prod(-1, keepdim=True) ** (1 / len(columns))
    top = a[:, columns] @ v[columns] + mean * v[others].sum(0)
    out = top / (a[:, columns].sum(-1, keepdim=True) + len(others) * mean)
    exact = a / a.sum(-1, keepdim=True) @ v
    is_pilot = torch.zeros(q.shape[0], 1, dtype=torch.bool)
    is_pilot[pilots] = True
    return torch.where(is_pilot, exact, out)


def naive(op, q, k, v):
    """All steps with every matrix formed, from the operator's own draws."""
    n, outs = q.shape[2], []
    weights = softmax_weights(q, k)
    for b, h in np.ndindex(2, 2):
        pilots = op.priority[h, :n].argsort()[: op.num_samples]
        importance = weights[b, h, pilots].norm(dim=0) * v[b, h].norm(dim=-1)
        columns = (importance.log() + op.gumbel[h, :n]).argsort(descending=True)[: op.num_samples]
        outs.append(one_head(q[b, h], k[b, h], v[b, h], pilots, columns))
    return torch.stack(outs).unflatten(0, (2, 2))


@pytest.mark.parametrize(("length", "num_samples"), [(2, 1), (9, 3), (33, 8), (33, 32)])
def test_streamed_form_equals_the_steps_forward_and_backward(length, num_samples):
    tensors, op = inputs(length, scale=1.3), operator(num_samples)
    found, expected = op(*tensors), naive(op, *tensors)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-10)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((x * cotangent).sum(), tensors) for x in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_pilot_rows_are_exact_and_others_are_not():
    tensors, op = [x.detach() for x in inputs(40, scale=1.5)], operator(6)
    error = (op(*tensors) - softmax_naive(*tensors)).norm(dim=-1)
    for head in range(2):
        rank = op.priority[head, :40].argsort().argsort()
        assert error[:, head, rank < 6].max() < 1e-12
        assert error[:, head, rank >= 6].min() > 1e-6


def test_importance_is_the_column_norm_that_the_pilots_see():
    q, k, v = (x.detach() for x in inputs(50, scale=2.0))
    lse = (q[:, :, :7] @ k.mT * 8**-0.5).logsumexp(-1)
    expected = softmax_weights(q[:, :, :7], k).norm(dim=2) * v.norm(dim=-1)
    torch.testing.assert_close(log_importance(q[:, :, :7], lse, k, v).exp(), expected, atol=1e-13, rtol=1e-11)
    large = [30 * x for x in (q[:, :, :7], k)]
    lse = (large[0] @ large[1].mT * 8**-0.5).logsumexp(-1)
    assert log_importance(large[0].float(), lse.float(), large[1].float(), v.float()).isfinite().all()


def test_with_all_rows_as_pilots_the_importance_is_optimal_for_the_product_with_the_values():
    """Monte Carlo on P V: the mean square error of sampling columns with p is ((sum_j |P_j| |v_j|)^2 - |P V|^2) / m
    ("Fast Monte Carlo Algorithms for Matrices I", Drineas, Kannan, Mahoney, 2006), and uniform columns do worse."""
    q, k, v = (x.detach()[:1, :1] for x in inputs(30, scale=2.5))
    weights = softmax_weights(q, k)[0, 0]
    importance = log_importance(q, (q @ k.mT * 8**-0.5).logsumexp(-1), k, v)[0, 0].exp()
    torch.testing.assert_close(importance, weights.norm(dim=0) * v[0, 0].norm(dim=-1), atol=1e-12, rtol=1e-10)
    product, m, draws = weights @ v[0, 0], 8, 4000
    generator, errors = torch.Generator().manual_seed(0), []
    for p in (importance / importance.sum(), torch.full_like(importance, 1 / 30)):
        chosen = torch.multinomial(p, m * draws, replacement=True, generator=generator).view(draws, m)
        estimate = torch.einsum("itc,tcd->tid", weights[:, chosen] / (m * p[chosen]), v[0, 0, chosen])
        errors.append((estimate - product).square().sum((1, 2)))
    predicted = (importance.sum() ** 2 - product.square().sum()) / m
    assert abs(errors[0].mean() - predicted) < 5 * errors[0].std() / draws**0.5
    assert errors[0].mean() < 0.8 * errors[1].mean()


def test_the_draw_is_successive_sampling_without_replacement():
    """Monte Carlo over seeds: the mean output equals that of numpy's own weighted draws, row by row."""
    q, k, v = (x.detach()[:1] for x in inputs(10, scale=2.0))
    draws, size = 600, 3
    outs = torch.stack([operator(size, seed=seed)(q, k, v)[0, 0] for seed in range(draws)])
    rng, weights = np.random.default_rng(0), softmax_weights(q, k)[0, 0]
    others = []
    for _ in range(draws):
        pilots = torch.from_numpy(rng.permutation(10)[:size])
        p = (weights[pilots].norm(dim=0) * v[0, 0].norm(dim=-1)).numpy()
        columns = torch.from_numpy(rng.choice(10, size, replace=False, p=p / p.sum()))
        others.append(one_head(q[0, 0], k[0, 0], v[0, 0], pilots, columns))
    others = torch.stack(others)
    allowed = 4.5 * ((outs.var(0) + others.var(0)) / draws).sqrt()
    assert ((outs.mean(0) - others.mean(0)).abs() < allowed).all()


def test_padding_belongs_to_no_sample():
    """With fewer real tokens than samples, padded rows are no pilots and padded keys are not kept: softmax there."""
    q, k, v = (x.detach() for x in inputs(40, batch=3))
    real = torch.arange(40) < torch.tensor([40, 25, 5])[:, None]
    op = operator(8)
    out = op(*(x.masked_fill(~real[:, None, :, None], torch.nan) for x in (q, k, v)), key_padding_mask=real)
    for example, length in enumerate((40, 25, 5)):
        short = op(*(x[example : example + 1, :, :length] for x in (q, k, v)))
        torch.testing.assert_close(out[example : example + 1, :, :length], short, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(out[2:, :, :5], softmax_naive(*(x[2:, :, :5] for x in (q, k, v))))


def test_zero_values_do_not_break_the_importance():
    q, k, v = (x.detach() for x in inputs(20))
    v[:, :, 3:] = 0
    assert operator(6)(q, k, v).isfinite().all()
    assert (operator(6)(q, k, 0 * v) == 0).all()


def test_error_falls_with_the_number_of_samples():
    q, k, v = (x.detach() for x in inputs(96))
    exact = softmax_naive(q, k, v)
    errors = [(operator(m)(q, k, v) - exact).norm() / exact.norm() for m in (8, 32, 80, 96)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`num_samples`"):
        Skeinformer(0, num_heads=2, max_length=8, seed=0)
    with pytest.raises(ValueError, match="`max_length`=128"):
        operator(4)(*(torch.zeros(1, 2, 129, 8, dtype=torch.float64) for _ in range(3)))
