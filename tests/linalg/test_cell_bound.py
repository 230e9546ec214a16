"""The three lemmas of the bound one by one, and its order."""

import pytest
import torch

from attnlens.linalg.cell_bound import Points, cell_bound
from attnlens.linalg.dense import softmax_naive
from attnlens.testing.inputs import EXACT, gaussian


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def halves(q, k, v, exponent_shift=0.0):
    """Output and bound where every row sees the keys as two points, the halves of the sequence."""
    b, h, n, d = q.shape
    means, values = (x.unflatten(2, (2, -1)).mean(3) for x in (k, v))
    exponent = q @ means.mT * d**-0.5 + torch.tensor(n / 2).log() + exponent_shift
    out = torch.softmax(exponent, -1) @ values
    owner = (torch.arange(n) >= n // 2).long().expand(b, h, n)
    visible = torch.ones(1, 1, n, 2, dtype=torch.bool)
    points = Points(owner, visible, exponent, torch.zeros(b, h, 2, dtype=q.dtype))
    return out, cell_bound([points], q, k, v, causal=False, key_padding_mask=None)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_mass_of_a_mean_key_by_hoeffding(scale):
    """0 <= log sum_j e^{x_j} - (mean x + log N) <= range^2 / 8; a skewed x comes near the upper end."""
    for x in (draw(1000, 7), draw(1000, 7).sign(), draw(1000, 7).square(), torch.eye(7, dtype=torch.float64)):
        x = scale * x
        ratio = torch.logsumexp(x, -1) - x.mean(-1) - torch.tensor(7.0, dtype=torch.float64).log()
        width = x.amax(-1) - x.amin(-1)
        assert (ratio >= -EXACT).all()
        assert (ratio <= width.square() / 8 + EXACT).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_total_variation_of_scaled_masses(scale):
    """min(tanh(range / 4), max(sum p (1 - e^r)+, sum p (e^r - 1)+)) bounds it, and tanh is attained."""
    mass, ratio = torch.softmax(3 * draw(4000, 6), -1), scale * draw(4000, 6, seed=1)
    ratio[::2, :3] = 0
    other = mass * ratio.exp() / (mass * ratio.exp()).sum(-1, keepdim=True)
    variation = (other - mass).abs().sum(-1) / 2
    shrunk, grown = (mass * -torch.expm1(ratio.clamp_max(0))).sum(-1), (mass * torch.expm1(ratio.clamp_min(0))).sum(-1)
    width = ratio.amax(-1) - ratio.amin(-1)
    assert (variation <= torch.maximum(shrunk, grown) + EXACT).all()
    assert (variation <= torch.tanh(width / 4) + EXACT).all()
    high = torch.tensor(scale, dtype=torch.float64)
    mass = torch.stack([1 / (1 + (high / 2).exp()), 1 / (1 + (-high / 2).exp())])
    other = mass * torch.stack([high.exp(), torch.ones_like(high)])
    assert torch.isclose((other / other.sum() - mass).abs().sum() / 2, torch.tanh(high / 4))


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.7])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_it_holds_for_any_exponent(scale, shift):
    """The masses of the two halves are off by opposite shifts as well."""
    q, k, v = gaussian(20, logit_scale=scale)
    out, bound = halves(q, k, v, torch.tensor([shift, -shift], dtype=torch.float64))
    error = (out - softmax_naive(q, k, v)).norm(dim=-1)
    assert (error <= bound).all()
    assert error.max() > bound.min() / 50


def test_mass_is_second_order_and_value_first():
    """With values equal within each half only masses are wrong: error and bound fall as the square of the scores."""
    q, k, v = gaussian(20)
    flat = v[:, :, :2].repeat_interleave(10, 2)
    for values, order in ((v, 1), (flat, 2)):
        size = []
        for scale in (0.02, 0.01):
            out, bound = halves(scale * q, k, values)
            size.append(torch.stack([(out - softmax_naive(scale * q, k, values)).norm(), bound.norm()]))
        assert torch.allclose((size[0] / size[1]).log2(), torch.full((2,), float(order), dtype=torch.float64), atol=0.1)
