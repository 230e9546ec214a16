"""Random Maclaurin features of the exponential kernel: products of signs of random degree.

    <x, y>^N = E prod_{t <= N} <r_t, x> <r_t, y>,   r_t in {-1, 1}^d,   e^{<x, y>} = sum_N <x, y>^N / N!,
    phi_f(x) = (m P(N_f) N_f!)^{-1/2} prod_{t <= N_f} <r_ft, x>,   N_f ~ P,   N <= D.

A factor has second moment S = E <r, x>^2 <r, y>^2 = |x|^2 |y|^2 + 2 <x, y>^2 - 2 sum_a x_a^2 y_a^2 <= 3 |x|^2 |y|^2,
and the estimate from one feature E = sum_N S^N/(P(N) N!^2). By the Cauchy-Schwarz inequality the best degrees have
P(N) ~ S^{N/2}/N!, a Poisson variable of mean S^{1/2}, with second moment e^{2 S^{1/2}}; geometric degrees, P(N) =
2^{-(N+1)}, have 2 I_0(2 (2 S)^{1/2}) ~ e^{2.83 S^{1/2}}. For a pair at a random angle S is near |x|^2 |y|^2.

Degrees are drawn systematically: N_f = P^{-1}((f + u)/m), one u uniform on (0, 1), so that each has the law P and the
count of each degree is m P(N) up to one. Given the degrees features are independent, hence

    Var = (1/m) sum_N (S^N - <x, y>^{2N})/(P(N) N!^2) + Var_u sum_N count_N(u) <x, y>^N/(m P(N) N!);

independent degrees have the variance of <x, y>^N/(P(N) N!) over N in place of m times the second term. The counts also
bound how many features have a t-th factor, whatever u: no factor is computed in vain, ~ m E N products of length d.
Truncation at D leaves the estimate unbiased for the sum up to D, which is e^z times the probability that a Poisson
variable of mean z is at most D, if z = <x, y> >= 0.

Sources: "Random Feature Maps for Dot Product Kernels" (Kar, Karnick, 2012); "Macformer: Transformer with Random
Maclaurin Feature Attention" (Guo, Ding, Yuan, Wang, 2024), https://arxiv.org/abs/2408.11656. Systematic degrees, the
Poisson measure and their variances are worked out here.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def degree_measure(max_degree: int, first: int, radius: float | None) -> Float[Tensor, "N"]:
    """P over degrees 0..max_degree in float64, zero below `first`: geometric, or Poisson of mean radius^2 (best for
    pairs of that length at a random angle); conditioned on the range."""
    degrees = torch.arange(max_degree + 1, dtype=torch.float64, device="cpu")
    if radius is None:
        log_measure = -(degrees + 1) * math.log(2)
    else:
        log_measure = 2 * degrees * math.log(radius) - torch.lgamma(degrees + 1)
    return torch.softmax(log_measure.masked_fill(degrees < first, -torch.inf), 0)


def capacities(measure: Float[Tensor, "N"], num_features: int) -> list[int]:
    """The largest possible count of features with a t-th factor, t = 1..max_degree, under systematic degrees."""
    at_least = measure.flip(0).cumsum(0).flip(0)[1:]
    return [min(num_features, math.ceil(num_features * share + 1e-9)) for share in at_least.tolist()]


def systematic_degrees(
    measure: Float[Tensor, "N"], num_features: int, offset: Float[Tensor, "*batch"]
) -> Int[Tensor, "*batch m"]:
    """The degrees at u = `offset`, descending."""
    positions = (torch.arange(num_features, dtype=torch.float64, device="cpu") + offset[..., None]) / num_features
    degrees = torch.searchsorted(measure.cumsum(0), positions).clamp_max(len(measure) - 1)
    return degrees.flip(-1)


def coefficients(degrees: Int[Tensor, "*batch m"], measure: Float[Tensor, "N"]) -> Float[Tensor, "*batch m"]:
    """(m P(N) N!)^{-1/2}."""
    factorials = torch.lgamma(torch.arange(len(measure), dtype=torch.float64, device="cpu") + 1)
    return torch.exp(-0.5 * (factorials + measure.log()))[degrees] * degrees.shape[-1] ** -0.5


def draw_factors(
    degrees: Int[Tensor, "h m"],
    scales: Float[Tensor, "h m"],
    widths: list[int],
    dim: int,
    generator: torch.Generator,
) -> Float[Tensor, "h l d"]:
    """The t-th factors of the first `widths[t-1]` features, for t = 1, 2, ...: signs times the N-th root of the scale,
    so that no product grows beyond the feature that it ends in."""
    roots = scales.pow(1 / degrees.clamp_min(1))
    roots = torch.cat([roots[:, :width] for width in widths], -1)
    signs = torch.randint(2, (*roots.shape, dim), generator=generator, device="cpu") * 2.0 - 1.0
    return signs * roots[..., None]


def maclaurin_features(
    x: Float[Tensor, "b h n d"],
    factors: Float[Tensor, "h l d"],
    degrees: Int[Tensor, "h m"],
    scales: Float[Tensor, "h m"],
    widths: list[int],
) -> Float[Tensor, "b h n m"]:
    """phi(x) from the factors that `draw_factors` drew."""
    levels = (x @ factors.to(x.dtype).mT).split(widths, -1)
    product = x.new_ones(*x.shape[:3], 0)
    # From the highest factor down, so that every product is only as wide as there are features of that degree.
    for t in range(len(widths), 0, -1):
        has = (degrees[:, : widths[t - 1]] >= t)[:, None]
        factor = torch.where(has, levels[t - 1], 1)
        width = product.shape[-1]
        product = torch.cat([factor[..., :width] * product, factor[..., width:]], -1)
    rest = x.new_ones(*x.shape[:3], degrees.shape[-1] - product.shape[-1])
    return torch.cat([product, rest], -1) * torch.where(degrees == 0, scales.to(x.dtype), 1)[:, None]


def factor_moment(x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """S of the module docstring."""
    squares = x.square().sum(-1) * y.square().sum(-1)
    return squares + 2 * (x * y).sum(-1).square() - 2 * (x.square() * y.square()).sum(-1)


def estimate_variance(
    x: Float[Tensor, "*batch d"],
    y: Float[Tensor, "*batch d"],
    measure: Float[Tensor, "N"],
    num_features: int,
    *,
    systematic: bool = True,
) -> Float[Tensor, "*batch"]:
    """Var <phi(x), phi(y)> in float64, for systematic or for independent degrees."""
    degrees = torch.arange(len(measure), dtype=torch.float64)
    used = measure > 0
    weight = torch.where(used, torch.exp(-torch.lgamma(degrees + 1)) / torch.where(used, measure, 1), 0)
    moment, inner = factor_moment(x, y)[..., None], (x * y).sum(-1, keepdim=True)
    within = (measure * weight.square() * (moment.pow(degrees) - inner.pow(2 * degrees))).sum(-1) / num_features
    means = weight * inner.pow(degrees)
    if not systematic:
        return within + ((measure * means.square()).sum(-1) - (measure * means).sum(-1).square()) / num_features
    # The counts change with u only where the distribution function times m has the fractional part u.
    edges = torch.cat([torch.zeros(1), (measure.cumsum(0) * num_features).frac(), torch.ones(1)]).double().sort().values
    drawn = systematic_degrees(measure, num_features, (edges[1:] + edges[:-1]) / 2)
    estimates = means[..., drawn].sum(-1) / num_features
    total = (measure * means).sum(-1, keepdim=True)
    return within + (edges.diff() * (estimates - total).square()).sum(-1)
