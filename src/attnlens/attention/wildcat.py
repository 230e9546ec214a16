"""WildCat: softmax attention over a coreset of keys found by randomly pivoted Cholesky, with optimal weights.

With recentered keys (softmax is invariant) and a temperature tau, e^{s<q,k>} is the product of features of tau q and
k / tau, so that keys can be replaced as points of H = exp(s K K^T / tau^2), s = 1/sqrt(d):

    W = H_SS^{-1} H_S:,   out = clip((e^{s Q K_S^T} W V) / (e^{s Q K_S^T} W 1), min_j v_j, max_j v_j),

S of r keys drawn one by one, a key with the probability of its share of the trace of H - H_:S H_SS^{-1} H_S:. The clip
is coordinate by coordinate; a row whose normalizer is not positive takes the mean of V. With R = max_j |k_j| and

    b = log(n) / (s R^2) + 2,   tau^2 = b / (2 W0(b / (2 rho))),   rho = sqrt(1 + exp(W0(2 / e^2) + 2)),

larger tau makes H smoother, at the price of the queries' features. In place of H the code uses the Gaussian kernel G of
the points x_j = k_j sqrt(s) / tau: H_jl = e^{|x_j|^2 / 2} G_jl e^{|x_l|^2 / 2}, whose diagonal is one.

Time O(r (n + m)(d + dv) + m r^2), memory O((n + m)(d + dv) + m r). W is the identity at r = m: softmax attention, taken
directly. S and nothing else is constant for the gradient.

Source: "WildCat: Near-Linear Attention in Theory and Practice" (Schröder, Mackey, 2026),
https://arxiv.org/abs/2602.10056; "Randomly pivoted Cholesky" (Chen, Epperly, Tropp, Webber, 2025),
https://arxiv.org/abs/2207.06503. Departures: the temperature takes the keys' radius for that of the queries, as the
authors' newest code does, so that rows stay independent; a pivot is drawn by inversion of one uniform number a step,
the law of a Gumbel maximum without its r x m noise; keys that the coreset reproduces up to round-off are never drawn;
no bins.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import real_first, take_rows
from attnlens.linalg.dense import mean_values, softmax_round_off
from attnlens.linalg.gaussian import gaussian_core, gaussian_product, nystrom_residual
from attnlens.linalg.partial import partial_attention
from attnlens.linalg.pivoted_cholesky import random_pivots

RHO = 3.1916010253237044


def lambert_w(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """W0(x) for x >= 0 by Newton steps on w e^w = x from log(1 + x) >= W0(x); differentiable by its last step."""
    with torch.no_grad():
        w = torch.log1p(x)
        for _ in range(8):
            w = w - (w - x * (-w).exp()) / (1 + w)
    return w - (w - x * (-w).exp()) / (1 + w)


def squared_temperature(
    query_radius: Float[Tensor, "..."], key_radius: Float[Tensor, "..."], count: Float[Tensor, "..."], scale: float
) -> Float[Tensor, "..."]:
    """tau^2 = (R_K / R_Q) b / (2 W0(b / (2 rho))), b = log(count) / (s R_Q R_K) + 2; radii must be positive."""
    b = count.log() / (scale * query_radius * key_radius) + 2
    return key_radius / query_radius * b / (2 * lambert_w(b / (2 * RHO)))


def kernel_spectra(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], tau: float
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h n+m"], Float[Tensor, "b h m"]]:
    """Singular values of A = exp(s Q K^T), eigenvalues of B = exp(s X X^T), X = [tau Q; K / tau], and of its key block
    H; largest first, in float64, in units of the largest of A, which tau leaves as it is.

    2 sigma_j(A) <= lambda_j(B) at every tau, and H falls with tau eigenvalue by eigenvalue as the query block rises.
    """
    points, scale = torch.cat([tau * q, k / tau], 2).double(), q.shape[-1] ** -0.5
    exponents = scale * q.double() @ k.double().mT
    # Largest exponents are taken out of the matrices, whose scale alone they are.
    top = exponents.amax((-2, -1), keepdim=True)
    of_a = torch.linalg.svdvals((exponents - top).exp())
    spectra = []
    for x in (points, points[:, :, q.shape[2] :]):
        exponents = scale * x @ x.mT
        peak = exponents.amax((-2, -1), keepdim=True)
        eigenvalues = torch.linalg.eigvalsh((exponents - peak).exp()).flip(-1)
        spectra.append(eigenvalues * (peak - top)[..., 0].exp() / of_a[..., :1])
    return of_a / of_a[..., :1], spectra[0], spectra[1]


class Coreset(NamedTuple):
    """Recentered keys, zero where padded; the same at the temperature, x = k sqrt(s) / tau; r of them, which of these
    places are filled, the Cholesky factor of G_SS (an empty place is a row of the identity); sqrt(s) tau."""

    keys: Float[Tensor, "b h m d"]
    x: Float[Tensor, "b h m d"]
    pivots: Int[Tensor, "b h r"]
    filled: Bool[Tensor, "b h r"]
    factor: Float[Tensor, "b h r r"]
    query_factor: Float[Tensor, "b h 1 1"]

    def values(self, v: Float[Tensor, "b h m dv"], real: Bool[Tensor, "#b m"]) -> Float[Tensor, "b h r dv+1"]:
        """e^{|x_s|^2 / 2} W [V, 1], divided by the largest e^{|x_l|^2 / 2}."""
        half = self.x.square().sum(-1, keepdim=True) / 2
        growth = (half - half.detach().amax(2, keepdim=True)).exp()
        weighted = growth * torch.cat([v, torch.ones_like(half)], -1) * real[:, None, :, None]
        product = gaussian_product(take_rows(self.x, self.pivots), self.x, weighted, 1.0)
        return torch.cholesky_solve(torch.where(self.filled[..., None], product, 0), self.factor)


def weighted_attention(
    q: Float[Tensor, "b h n d"], coreset: Coreset, v: Float[Tensor, "b h m dv"], real: Bool[Tensor, "#b m"]
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n 1"], Float[Tensor, "b h n"]]:
    """Numerator and normalizer of the quotient, both over exp of the third, and without the factor of `values`;
    those of softmax attention where every real key has a place."""
    keys, x, pivots, filled, *_ = coreset
    scale, ones = q.shape[-1] ** -0.5, torch.ones_like(v[..., :1])
    direct = (real.sum(-1) <= pivots.shape[-1])[:, None, None, None]
    values = torch.where(direct, take_rows(torch.cat([v, ones], -1), pivots), coreset.values(v, real))
    lift = torch.where(direct, 0, -take_rows(x, pivots).square().sum(-1, keepdim=True) / (2 * scale))
    rows = torch.cat([q, torch.ones_like(q[..., :1])], -1)
    columns = torch.cat([take_rows(keys, pivots), lift], -1)
    empty = torch.zeros(filled.shape, dtype=q.dtype, device=q.device).masked_fill(~filled, -math.inf)
    out, lse = partial_attention(rows, columns, values, bias=empty[:, :, None], scale=scale)
    return out[..., :-1], out[..., -1:], lse


class WildCat(AbstractAttention):
    """Attention over a weighted coreset of keys.

    Args:
        num_keys: r, the size of the coreset, at least 1.
        num_heads: each has its own draws.
        seed: of the draws.
        tau: the temperature, above 0; by default the formula above.
    """

    family = "low rank"
    budget = "num_keys"
    causal = False

    def __init__(self, num_keys: int, num_heads: int, seed: int, tau: float | None = None) -> None:
        super().__init__()
        if num_keys < 1:
            raise ValueError(f"`num_keys` must be at least 1, got {num_keys}")
        if tau is not None and not 0 < tau < math.inf:
            raise ValueError(f"`tau` must be above 0 and finite, got {tau}; None takes the formula")
        self.num_keys = num_keys
        self.tau = tau
        generator = torch.Generator().manual_seed(seed)
        self.uniform: Tensor
        self.register_buffer("uniform", torch.rand(num_heads, num_keys, generator=generator, device="cpu"))

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every key in the coreset."""
        return {"num_keys": length}

    def squared_tau(self, k: Float[Tensor, "b h m d"], real: Bool[Tensor, "#b m"]) -> Float[Tensor, "..."]:
        """tau^2 of every head, for recentered keys with zero padding."""
        if self.tau is not None:
            return torch.full_like(k[:, :, :1, :1], self.tau**2)
        scale = k.shape[-1] ** -0.5
        # Keys that all agree have radius zero: any temperature will do, and 1e-3 keeps the formula finite.
        radius = (scale * k.square().sum(-1)).amax(-1).clamp_min(1e-6)[..., None, None].sqrt()
        count = real.sum(-1).clamp_min(1).to(k.dtype)[:, None, None, None]
        return squared_temperature(radius, radius, count, 1.0)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        if k.shape[2] <= self.num_keys:
            return partial_attention(q, k, v, key_padding_mask=key_padding_mask)[0]
        real = k.new_ones(1, k.shape[2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        out, normalizer, _ = weighted_attention(q, self.coreset(k, real), v, real)
        negative = normalizer <= smallest(normalizer)
        mean = mean_values(v, causal=False, key_padding_mask=key_padding_mask)
        out = torch.where(negative, mean, out / torch.where(negative, 1, normalizer))
        low, high = value_range(v, real)
        return torch.where(real.any(-1)[:, None, None, None], out.maximum(low).minimum(high), 0)

    def coreset(self, k: Float[Tensor, "b h m d"], real: Bool[Tensor, "#b m"]) -> Coreset:
        """The coreset of the real keys; all of them, in order, where there are no more than places."""
        r = self.num_keys
        k = (k - mean_values(k, causal=False, key_padding_mask=real.expand(k.shape[0], -1))) * real[:, None, :, None]
        scale, squared_tau = k.shape[-1] ** -0.5, self.squared_tau(k, real)
        x = k * (scale / squared_tau).sqrt()
        pivots, filled = random_pivots(x, self.uniform, real)
        count = real.sum(-1)[:, None, None]
        direct = count <= r
        pivots = torch.where(direct, real_first((~real).to(torch.uint8), None)[:, None, :r], pivots)
        filled = torch.where(direct, torch.arange(r, device=k.device) < count, filled)
        # A direct example needs no core: equal keys would make it singular, and its gradient NaN.
        both = filled[..., None] & filled[..., None, :] & ~direct[..., None]
        core = torch.where(both, gaussian_core(take_rows(x, pivots), 1.0), torch.eye(r, dtype=x.dtype, device=x.device))
        return Coreset(k, x, pivots, filled, torch.linalg.cholesky_ex(core).L, (scale * squared_tau).sqrt())

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """The diameter of the values' box, and where smaller the residual's bound (docs/low_rank.md)."""
        if k.shape[2] <= self.num_keys:
            return softmax_round_off(q, k, v)
        real = k.new_ones(1, k.shape[2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        k, v = (torch.where(real[:, None, :, None], x, 0) for x in (k, v))
        coreset = self.coreset(k, real)
        _, normalizer, lse = weighted_attention(q, coreset, v, real)
        marks = take_rows(coreset.x, coreset.pivots), coreset.factor, coreset.filled, 1.0
        lifted = q * coreset.query_factor
        half_q, half_k = (y.square().sum(-1) / 2 for y in (lifted, coreset.x))
        missed = nystrom_residual(coreset.x, *marks).sqrt() * (half_k - half_k.amax(-1, keepdim=True)).exp()
        missed = (missed * real[:, None]).sum(-1, keepdim=True) * nystrom_residual(lifted, *marks).sqrt()
        normalizer = normalizer.squeeze(-1)
        low, high = value_range(v, real)
        ratio = torch.where(normalizer > smallest(normalizer), missed * (half_q - lse).exp() / normalizer, math.inf)
        return (high - low).norm(dim=-1) * ratio.clamp_max(1)


def smallest(normalizer: Tensor) -> float:
    """Up to which a normalizer counts as zero: its reciprocal must stay finite, in the gradient too."""
    return torch.finfo(normalizer.dtype).tiny ** 0.75


def value_range(
    v: Float[Tensor, "b h m dv"], real: Bool[Tensor, "#b m"]
) -> tuple[Float[Tensor, "b h 1 dv"], Float[Tensor, "b h 1 dv"]]:
    """Smallest and largest real value of every coordinate."""
    hidden = ~real[:, None, :, None]
    return v.masked_fill(hidden, math.inf).amin(2, keepdim=True), v.masked_fill(hidden, -math.inf).amax(2, keepdim=True)
