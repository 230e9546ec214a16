"""FAVOR#: Performer before it is fitted, and a smaller second moment on the pairs it was fitted to."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.linalg.exponential_features import log_second_moment
from attnlens.linalg.random_features import positive_log_features


def operator(name="favor_sharp", head_dim=8, seed=0, **overrides):
    config = OmegaConf.load(f"conf/attention/{name}.yaml")
    return build(config, head_dim=head_dim, num_heads=2, max_length=128, seed=seed, **overrides).double()


def inputs(length, scale=1.0, head_dim=8):
    """Queries and keys with unequal variances and a common mean, as trained models have them."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, 2, length, head_dim, generator=generator, dtype=torch.float64)
    stretch = torch.linspace(0.2, 1.8, head_dim, dtype=torch.float64) * scale
    return q * stretch + 0.3, k * stretch - 0.5, v


def logs_at(fitted, q, k):
    """Mean log of the relative second moment over all pairs, a head."""
    scale = q.shape[-1] ** -0.25
    z = scale * (q[..., :, None, :] + k[..., None, :, :])
    rotation, a = fitted.rotation.double(), fitted.coefficients.double()
    return log_second_moment(torch.einsum("bhijd,hde->bhije", z, rotation), a[:, None, None]).mean((0, 2, 3))


@pytest.mark.parametrize("causal", [False, True])
def test_before_it_is_fitted_it_is_performer(causal):
    q, k, v = inputs(40)
    assert torch.equal(operator()(q, k, v, causal=causal), operator("performer")(q, k, v, causal=causal))


@pytest.mark.parametrize("isotropic", [False, True])
def test_the_mean_log_second_moment_falls_by_what_fit_says(isotropic):
    q, k, _ = inputs(30)
    fitted = operator(isotropic=isotropic)
    before = logs_at(fitted, q, k)
    gain = fitted.fit(q, k)
    after = logs_at(fitted, q, k)
    assert (after < before).all()
    torch.testing.assert_close(before - after, gain, atol=1e-5, rtol=1e-5)


def test_a_matrix_does_better_than_one_coefficient():
    q, k, _ = inputs(30)
    gains = [operator(isotropic=isotropic).fit(q, k) for isotropic in (True, False)]
    assert (gains[1] > 1.05 * gains[0]).all()


def test_no_nearby_fit_is_better():
    q, k, _ = inputs(30)
    fitted = operator()
    fitted.fit(q, k)
    best = logs_at(fitted, q, k)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = operator()
        noise = 0.2 * torch.randn(2, 8, 8, generator=generator)
        turned = torch.linalg.qr(fitted.rotation + noise)[0]
        other.rotation.copy_(turned)
        stretch = (0.2 * torch.randn(2, 8, generator=generator)).exp()
        other.coefficients.copy_(fitted.coefficients * stretch)
        assert (logs_at(other, q, k) >= best - 1e-6).all()


def test_fitted_it_stays_unbiased_and_its_variance_is_that_of_the_formula():
    """Independent draws; the relative second moment of one is E phi^2."""
    q, k, _ = (x[:1, :, :3] for x in inputs(30, scale=0.4))
    found = []
    for seed in range(3000):
        fitted = operator(seed=seed, num_features=4, orthogonal=False)
        fitted.fit(q, k)
        found.append(fitted.kernel(q, k) / fitted.kernel_target(q, k))
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - 1).abs() < 5 * error).all()
    z = q.shape[-1] ** -0.25 * (q[..., :, None, :] + k[..., None, :, :])
    z = torch.einsum("bhijd,hde->bhije", z, fitted.rotation.double())
    variance = (log_second_moment(z, fitted.coefficients.double()[:, None, None]).exp() - 1) / 4
    torch.testing.assert_close(found.var(0), variance, rtol=0.25, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_fitted_it_equals_its_explicit_features_forward_and_backward(causal):
    q, k, v = (x.requires_grad_() for x in inputs(70))
    fitted = operator()
    fitted.fit(q.detach(), k.detach())
    kernel = fitted.kernel(q, k)
    kernel = kernel.tril() if causal else kernel
    exact = kernel @ v / kernel.sum(-1, keepdim=True)
    out = fitted(q, k, v, causal=causal)
    torch.testing.assert_close(out, exact, atol=1e-10, rtol=1e-9)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads, others = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (out, exact))
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-9, rtol=1e-7)


def test_the_fit_is_saved_and_padding_has_no_part_in_it():
    q, k, v = inputs(30)
    mask = (torch.arange(30) < 20).expand(2, -1)
    fitted, short = operator(), operator()
    fitted.fit(*(torch.where(mask[:, None, :, None], x, torch.nan) for x in (q, k)), mask)
    short.fit(q[:, :, :20], k[:, :, :20])
    torch.testing.assert_close(fitted.coefficients, short.coefficients)
    loaded = operator(seed=5)
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded(q, k, v), fitted(q, k, v))


def test_without_a_gaussian_factor_features_are_the_positive_ones():
    q, k, _ = inputs(6)
    performer = operator("performer")
    x, y = q * 8**-0.25, k * 8**-0.25
    w = performer.projections.expand(2, -1, -1, -1).double()
    explicit = positive_log_features(x, w).exp() @ positive_log_features(y, w).exp().mT
    torch.testing.assert_close(operator().kernel(q, k), explicit)


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="`num_features`"):
        operator(num_features=0)
    q, k, _ = inputs(4)
    with pytest.raises(ValueError, match="`queries`"):
        operator().fit(q[:, :1], k[:, :1])
