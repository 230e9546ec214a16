"""Random feature attention: softmax attention of unit queries and keys, from trigonometric random features.

    out_i = sum_j <phi(x_i), phi(y_j)> v_j / sum_j <phi(x_i), phi(y_j)>,   x = q/|q|,   y = k/|k|,
    phi(x) = m^{-1/2} (sin <w_f, x>, cos <w_f, x>)_f,   w_f ~ N(0, I/sigma^2),   j <= i if causal.

E <phi(x), phi(y)> = exp(-|x - y|^2/(2 sigma^2)) = e^{-1/sigma^2} exp(<x, y>/sigma^2) for unit vectors, so that the
target is softmax attention of x and y at the temperature sigma^2, `normalized_softmax`; reached for no finite m. Sums
over j come first: time O(n m (d + dv)), memory O(n m), a causal state of (2m + 1)(dv + 1) + 1 numbers. Lengths of q and
k have no effect: logits lie in [-1, 1]/sigma^2, and two weights of the target differ by a factor of e^{2/sigma^2} at
most. A zero vector stays zero, at distance 1 to all, where a logit of zero would be a distance of sqrt(2).

The kernel estimate is unbiased with variance (1 - e^{-|x - y|^2/sigma^2})^2/(2 m), at most 1/(2 m), against kernel
values down to e^{-2/sigma^2}: the error falls like m^{-1/2}. Estimates are signed. Where a row sum is below its noise
the row is drawn to the mean of the values, see attnlens.linalg.signed_features; `held` tells which rows are. Every row
adds up to one.

Source: "Random Feature Attention" (Peng, Pappas, Yogatama, Schwartz, Smith, Kong, 2021),
https://arxiv.org/abs/2103.02143. Departures: no gate, which the paper computes from the layer's input, not from q, k
and v; one draw for all steps where the paper picks among many; a learned sigma is one number a head, for with one a
channel, as in the paper, |x/sigma| is not constant and the kernel no longer that of softmax; nothing is added to norms
or normalizers; orthogonal draws.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.dense import mean_values, softmax_naive
from attnlens.linalg.random_features import gaussian_projections
from attnlens.linalg.signed_features import (
    SignedState,
    Sums,
    all_sums,
    causal_sums,
    empty_signed,
    held_ratio,
    held_rows,
    noise_floor,
    signed_attention,
)
from attnlens.linalg.trigonometric_features import (
    feature_covariance,
    gaussian_values,
    trigonometric_features,
    unit_length,
)


def normalized_softmax(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    sigma: Float[Tensor, "h"],
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """Softmax attention of unit queries and keys at temperature sigma^2, in float64 when given float64."""
    x = unit_length(q) * (q.shape[-1] ** 0.5 / sigma.square())[:, None, None]
    return softmax_naive(x, unit_length(k), v, causal=causal, key_padding_mask=key_padding_mask)


def chebyshev_bound(
    covariance: Float[Tensor, "b h n m m"],
    kernel: Float[Tensor, "b h n m"],
    visible: Bool[Tensor, "b #h n m"],
    v: Float[Tensor, "b h m dv"],
    out: Float[Tensor, "b h n dv"],
    mean: Float[Tensor, "b h #n dv"],
    floor: Float[Tensor, "b h n"],
) -> Float[Tensor, "b h n"]:
    """A bound on the error of every row that fails with probability 0.1 at most.

    Numerator less out_i times the mass has mean zero and second moment sum_jl Cov_jl <v_j - out_i, v_l - out_i>, the
    mass sum_jl Cov_jl: Chebyshev's inequality at 0.05 for each. What the floor adds to the mass is at most the floor
    less the smallest mass, and counts times |out_i - a_i|, a_i the mean of the values.
    """
    covariance = covariance * (visible[..., :, None] & visible[..., None, :])
    centered = v[:, :, None] - out[..., None, :]
    of_sum = ((covariance @ centered) * centered).sum((-2, -1))
    of_sum, of_mass = ((20 * part.clamp_min(0)).sqrt() for part in (of_sum, covariance.sum((-2, -1))))
    least = (kernel * visible).sum(-1) - of_mass
    divisor = least.maximum(floor)
    raised = (out - mean).norm(dim=-1) * (floor - least).clamp_min(0)
    return (of_sum + raised) / torch.where(divisor > 0, divisor, 1)


class Rfa(AbstractRecurrentAttention):
    """Random feature attention with its own draw for every head.

    Args:
        num_features: frequencies m, at least 1; each has a sine and a cosine.
        sigma: positive; the temperature of the softmax is its square.
        head_dim: of queries and keys.
        num_heads: every head has its own draw.
        seed: of the draws.
        orthogonal: orthogonal within blocks of `head_dim` frequencies instead of independent; the bound, which is
            proved for independent ones, is then None.
        learned: whether sigma is a parameter, one number a head.
    """

    family = "random features"
    budget = "num_features"
    target = "rfa"
    order = 0.5
    unbiased = True
    bound_probability = 0.9

    def __init__(
        self,
        num_features: int,
        sigma: float,
        head_dim: int,
        num_heads: int,
        seed: int,
        orthogonal: bool = True,
        learned: bool = False,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"`num_features` must be at least 1, got {num_features}")
        if not sigma > 0:
            raise ValueError(f"`sigma` must be positive, got {sigma}")
        self.orthogonal = orthogonal
        generator = torch.Generator().manual_seed(seed)
        draws = [
            gaussian_projections(num_features, head_dim, orthogonal=orthogonal, generator=generator)
            for _ in range(num_heads)
        ]
        self.projections: Tensor
        self.register_buffer("projections", torch.stack(draws).float())
        self.log_sigma: Tensor
        log_sigma = torch.full((num_heads,), float(sigma)).log()
        if learned:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """<phi(x_i), phi(y_j)>, the estimate of exp(-|x_i - y_j|^2/(2 sigma^2))."""
        return self.features(q) @ self.features(k).mT

    def kernel_target(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """exp(-|x - y|^2/(2 sigma^2))."""
        return gaussian_values(unit_length(q), unit_length(k), self._sigma(q)[:, None, None])

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """Softmax attention of unit queries and keys at temperature sigma^2, in float64."""
        q, k, v = q.double(), k.double(), v.double()
        return normalized_softmax(q, k, v, self._sigma(q), causal=causal, key_padding_mask=key_padding_mask)

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"] | None:
        """`chebyshev_bound` for independent frequencies, from n x m x m numbers: for analysis."""
        if self.orthogonal:
            return None
        real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        k, v = (torch.where(real[:, None, :, None], x, 0).double() for x in (k, v))
        out = self.reference(q, k, v, causal=causal, key_padding_mask=real)
        visible = real[:, None, None].expand(-1, -1, q.shape[2], -1)
        visible = visible.tril() if causal else visible
        x, y, sigma = unit_length(q.double()), unit_length(k), self._sigma(v)[:, None, None]
        covariance = feature_covariance(x, y, sigma) / self.projections.shape[1]
        f_y, mean = self.features(k), mean_values(v, causal=causal, key_padding_mask=real)
        energy = (visible * f_y.square().sum(-1)[:, :, None]).sum(-1)
        sums = Sums(v.new_zeros(*q.shape[:3], v.shape[-1] + 1), visible.double() @ f_y, energy, mean)
        floor = noise_floor(self.features(q.double()), sums)
        return chebyshev_bound(covariance, gaussian_values(x, y, sigma), visible, v, out, mean, floor)

    def held(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Bool[Tensor, "b h n"]:
        """Which rows have a sum below its noise, and are drawn to the mean of the values."""
        f_x, f_y = self.features(q), self.features(k, key_padding_mask)
        return held_rows(f_x, causal_sums(f_x, f_y, f_y[..., :1])[1] if causal else all_sums(f_x, f_y, f_y[..., :1]))

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        f_x, f_y = self.features(q), self.features(k, key_padding_mask)
        return signed_attention(f_x, f_y, v, causal=causal, key_padding_mask=key_padding_mask)

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> SignedState:
        """Empty sums."""
        return empty_signed(batch, num_heads, 2 * self.projections.shape[1], value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[SignedState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n m (d + dv)), whatever came before."""
        past = SignedState(*state)
        dtype = past.moment.dtype
        f_x, f_y = (self.features(each.to(dtype)) for each in (q, k))
        after, sums = causal_sums(f_x, f_y, v.to(dtype), past=past, final_state=True)
        assert after is not None
        return after, held_ratio(f_x, sums).to(q.dtype)

    def features(
        self, x: Float[Tensor, "b h n d"], key_padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b h n r"]:
        """phi of queries or keys, zero at padding."""
        num_heads, _, head_dim = self.projections.shape
        if (x.shape[1], x.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`q` has {x.shape[1]} heads of {x.shape[3]}, but the draws are for {num_heads} heads of {head_dim}: "
                "build with the `num_heads` and `head_dim` of the input"
            )
        frequencies = self.projections.to(x.dtype) / self._sigma(x)[:, None, None]
        phi = trigonometric_features(unit_length(x), frequencies.expand(x.shape[0], -1, -1, -1))
        # A zero key is not a missing one: its cosines are ones.
        return phi if key_padding_mask is None else torch.where(key_padding_mask[:, None, :, None], phi, 0)

    def _sigma(self, like: Tensor) -> Float[Tensor, "h"]:
        return self.log_sigma.to(like.dtype).exp()
