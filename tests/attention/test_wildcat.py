"""WildCat against its formula, its temperature, the spectra that it trades, its bound and its exact limits."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.special
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.softmax import softmax_naive
from attnlens.attention.wildcat import RHO, WildCat, kernel_spectra, lambert_w, squared_temperature
from attnlens.linalg.gaussian import gaussian_naive


def inputs(length, *, scale=1.0, value_dim=5, head_dim=8, batch=2):
    generator = torch.Generator().manual_seed(length)
    widths = (head_dim, head_dim, value_dim)
    q, k, v = (torch.randn(batch, 2, length, w, generator=generator, dtype=torch.float64) for w in widths)
    return [x.requires_grad_() for x in (q * scale, k * scale, v)]


def operator(num_keys, head_dim=8, **overrides):
    config = OmegaConf.load("conf/attention/wildcat.yaml")
    return build(config, head_dim=head_dim, num_heads=2, max_length=128, num_keys=num_keys, **overrides).double()


def everything(k):
    return torch.ones(1, k.shape[2], dtype=torch.bool)


def naive(op, q, k, v):
    """The formula with H itself, every matrix formed, from the operator's own pivots."""
    scale = q.shape[-1] ** -0.5
    centered = k - k.mean(2, keepdim=True)
    pivots = op.coreset(k, everything(k)).pivots[..., None]
    keys = centered.take_along_dim(pivots, 2)
    h, rows = ((scale / op.squared_tau(centered, everything(k)) * keys @ y.mT).exp() for y in (keys, centered))
    kernel = (scale * q @ keys.mT).exp() @ torch.linalg.inv(h) @ rows
    normalizer = kernel.sum(-1, keepdim=True)
    out = torch.where(normalizer > 0, kernel @ v / normalizer, v.mean(2, keepdim=True))
    return out.maximum(v.amin(2, keepdim=True)).minimum(v.amax(2, keepdim=True))


@pytest.mark.parametrize(("length", "num_keys", "scale"), [(2, 1, 1.0), (13, 4, 0.5), (33, 8, 1.0), (33, 20, 1.7)])
def test_streamed_form_equals_the_formula_forward_and_backward(length, num_keys, scale):
    tensors, op = inputs(length, scale=scale), operator(num_keys)
    found, expected = op(*tensors), naive(op, *tensors)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-8)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((x * cotangent).sum(), tensors) for x in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


def test_gradients_through_the_temperature_and_the_weights():
    q, k, v = (x.detach()[:1, :, :, :3].contiguous().requires_grad_() for x in inputs(7))
    assert torch.autograd.gradcheck(operator(4), (q, k, v), eps=1e-6, atol=1e-6, rtol=1e-4)


def test_weights_from_the_gaussian_kernel_are_those_from_the_exponential_one():
    """G_SS^{-1} G_S: * exp((|x_l|^2 - |x_s|^2) / 2) = H_SS^{-1} H_S: = W, an interpolation: W_:S = I."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = x.square().sum(-1) / 2
    g = gaussian_naive(x, x, 1.0)
    weights = torch.linalg.solve(g[:5, :5], g[:5]) * (half - half[:5, None]).exp()
    h = (x @ x.mT).exp()
    torch.testing.assert_close(weights, torch.linalg.solve(h[:5, :5], h[:5]), atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(weights[:, :5], torch.eye(5, dtype=x.dtype), atol=1e-9, rtol=0)


def test_lambert_function_and_the_constant():
    x = torch.logspace(-6, 8, 60, dtype=torch.float64)
    np.testing.assert_allclose(lambert_w(x).numpy(), scipy.special.lambertw(x.numpy()).real, rtol=1e-14)
    assert lambert_w(torch.zeros(1, dtype=torch.float64)) == 0
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambert_w, x[:40], eps=1e-8, atol=1e-5, rtol=1e-4)
    assert math.isclose(RHO, math.sqrt(1 + math.exp(scipy.special.lambertw(2 / math.e**2).real + 2)), rel_tol=1e-15)


def test_temperature():
    """One value by hand, the limit of large keys, and the trade: tau^2 is proportional to R_K / R_Q."""
    one = torch.ones((), dtype=torch.float64)
    b = math.log(100) / 6 + 2
    expected = 2 / 3 * b / (2 * scipy.special.lambertw(b / (2 * RHO)).real)
    assert math.isclose(squared_temperature(3 * one, 2 * one, 100 * one, 1.0), expected, rel_tol=1e-14)
    limit = squared_temperature(1e6 * one, 1e6 * one, 100 * one, 1.0)
    assert math.isclose(limit, 1 / scipy.special.lambertw(1 / RHO).real, rel_tol=1e-5)
    a, b = squared_temperature(4 * one, 1 * one, 9 * one, 0.5), squared_temperature(1 * one, 4 * one, 9 * one, 0.5)
    assert math.isclose(b / a, 16, rel_tol=1e-12)


def test_the_temperature_trades_one_spectrum_for_the_other():
    """The decay of A does not carry over to B. 2 sigma_j(A) <= lambda_j(B) whatever tau, and since H is a power
    series in s / tau^2 with positive semidefinite coefficients, all its eigenvalues fall with tau, and those of the
    query block rise."""
    q, k, _ = (x.detach() for x in inputs(30, scale=0.8, head_dim=6))
    q = q[:, :, :20]
    largest = torch.linalg.svdvals((q @ k.mT * 6**-0.5).exp())[..., :1]
    of_keys, of_queries, needed = [], [], []
    for tau in (0.4, 0.8, 1.25, 2.5):
        of_a, of_b, of_h = kernel_spectra(q, k, tau)
        assert (2 * of_a <= of_b[..., :20] + 1e-13 * of_b[..., :1]).all()
        points = torch.cat([tau * q, k / tau], 2)
        block = (points @ points.mT * 6**-0.5).exp()
        expected = torch.linalg.eigvalsh(block).flip(-1) / largest
        torch.testing.assert_close(of_b, expected, atol=1e-10 * expected.max().item(), rtol=1e-9)
        expected = torch.linalg.eigvalsh(block[:, :, 20:, 20:]).flip(-1) / largest
        torch.testing.assert_close(of_h, expected, atol=1e-10 * expected.max().item(), rtol=1e-9)
        of_keys.append(of_h)
        of_queries.append(torch.linalg.eigvalsh(block[:, :, :20, :20]))
        needed.append((of_b[..., 5:].sum(-1)).mean().item())
    for larger, smaller in pairwise(of_keys):
        assert (smaller <= larger + 1e-13 * larger.amax().maximum(smaller.amax())).all()
    for smaller, larger in pairwise(of_queries):
        assert (smaller <= larger + 1e-13 * larger.amax().maximum(smaller.amax())).all()
    assert min(needed[1:3]) < 0.5 * min(needed[0], needed[3]), "what rank 5 leaves of B is least between the extremes"
    assert all(x.isfinite().all() for x in kernel_spectra(4.0 * q, 4.0 * k, 1.0))


def test_exact_when_the_coreset_holds_every_distinct_key():
    """Repeated keys are never drawn twice, and the core stays regular: exact with fewer places than keys."""
    q, k, v = (x.detach() for x in inputs(24))
    k = k[:, :, :6].repeat(1, 1, 4, 1)
    torch.testing.assert_close(operator(8)(q, k, v), softmax_naive(q, k, v), atol=1e-9, rtol=1e-9)
    single = operator(8).float()(q.float(), k.float(), v.float())
    assert (single - softmax_naive(q, k, v)).abs().max() < 1e-3


def test_outputs_stay_within_the_range_of_the_values():
    """Weights may be negative and the normalizer too; neither leaves the box of the values."""
    for scale in (1.0, 3.0, 10.0):
        q, k, v = (x.detach() for x in inputs(64, scale=scale))
        for tau in (None, 0.3):
            out = operator(4, tau=tau)(q, k, v)
            assert (out >= v.amin(2, keepdim=True)).all()
            assert (out <= v.amax(2, keepdim=True)).all()
    constant = torch.full_like(v, 2.5)
    assert (operator(4)(q, k, constant) == 2.5).all()


def test_the_bound_closes_with_the_coreset():
    q, k, v = (x.detach() for x in inputs(40, scale=0.3))
    exact, bounds = softmax_naive(q, k, v), []
    for num_keys in (4, 16, 36):
        op = operator(num_keys)
        bound = op.error_bound(q, k, v)
        assert ((op(q, k, v) - exact).norm(dim=-1) <= bound).all()
        bounds.append(bound.mean())
    box = (v.amax(2) - v.amin(2)).norm(dim=-1).mean()
    assert bounds[0] > bounds[1] > bounds[2]
    assert bounds[1] < 0.1 * box, "at small logits it says more than the clip does"


def test_bound_with_padding_and_other_lengths():
    q, k, v = (x.detach() for x in inputs(40, scale=0.3))
    q = q[:, :, :17]
    real = torch.arange(40) < torch.tensor([40, 29])[:, None]
    poisoned = [x.masked_fill(~real[:, None, :, None], torch.nan) for x in (k, v)]
    op = operator(8)
    error = (op(q, *poisoned, key_padding_mask=real) - op.reference(q, *poisoned, key_padding_mask=real)).norm(dim=-1)
    bound = op.error_bound(q, *poisoned, key_padding_mask=real)
    assert (error <= bound).all()
    short = op.error_bound(q[1:], k[1:, :, :29], v[1:, :, :29])
    torch.testing.assert_close(bound[1:], short, atol=1e-10, rtol=1e-6)


def test_equal_keys_and_many_examples_of_different_length():
    """Radius zero, one real key, fewer keys than places: finite, with finite gradients, and exact."""
    q, k, v = inputs(30, batch=4)
    real = torch.arange(30) < torch.tensor([30, 12, 5, 1])[:, None]
    same = 0 * k + 1
    for keys in (k, same):
        out = operator(8)(q, keys, v, key_padding_mask=real)
        exact = softmax_naive(q, keys, v, key_padding_mask=real)
        torch.testing.assert_close(out[2:], exact[2:], atol=1e-10, rtol=1e-9)
        if keys is same:
            torch.testing.assert_close(out, exact, atol=1e-9, rtol=1e-9)
        grads = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
        assert all(x is None or x.isfinite().all() for x in grads)


@pytest.mark.parametrize("copies", [1, 4, 16])
def test_loud_and_repeated_keys_in_single_precision(copies):
    """Logits of hundreds and more: round-off in exponents made copies of a key look new, and the core singular."""
    for scale in (5.0, 20.0, 100.0):
        q, k, v = (x.detach().float() for x in inputs(64 // copies, scale=scale, head_dim=32))
        q, k, v = (x.repeat(1, 1, copies, 1).requires_grad_() for x in (q, k, v))
        out = operator(12, head_dim=32).float()(q, k, v)
        assert out.isfinite().all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_better_than_as_many_random_keys_on_smooth_keys():
    q, k, v = (x.detach() for x in inputs(128, head_dim=16, value_dim=16))
    position = torch.arange(128, dtype=torch.float64)
    smooth = torch.exp(-((position[:, None] - position) ** 2) / (2 * 8**2))
    q, k = (2 * smooth @ x / smooth.square().sum(-1, keepdim=True).sqrt() for x in (q, k))
    exact = softmax_naive(q, k, v)
    null = (v.mean(2, keepdim=True) - exact).norm()
    keys, values = (x[:, :, ::4] for x in (k, v))
    assert (operator(32)(q, k, v) - exact).norm() < 0.2 * null
    assert (operator(32)(q, k, v) - exact).norm() < 0.2 * (softmax_naive(q, keys, values) - exact).norm()


@pytest.mark.parametrize(("name", "value"), [("num_keys", 0), ("tau", 0.0), ("tau", math.inf)])
def test_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        WildCat(**{"num_keys": 4, "num_heads": 2, "seed": 0, name: value})
