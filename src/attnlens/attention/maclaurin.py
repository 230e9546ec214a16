"""Random Maclaurin attention: the exponential kernel from products of random signs, degree by degree.

    out_i = sum_j <phi(x_i), phi(y_j)> v_j / sum_j <phi(x_i), phi(y_j)>,   x = d^{-1/4} q,   y = d^{-1/4} k,
    phi_f(x) = (m P(N_f) N_f!)^{-1/2} prod_{t <= N_f} <r_ft, x>,   r_ft in {-1, 1}^d,   N_f ~ P,   j <= i if causal.

E <phi(x), phi(y)> = sum_N <x, y>^N/N!, up to the degree `max_degree`: softmax attention, reached for no finite m. Sums
over j come first: time O(n m (E N d + dv)), memory O(n m (1 + E N)), a causal state of (m + 1)(dv + 1) + 2 numbers. The
error falls like m^{-1/2}, from a variance of about e^{2 |x| |y|}/m with `radius` near the lengths of x and y, and of
e^{2.83 |x| |y|}/m with geometric degrees: see attnlens.linalg.maclaurin_features.

`exact_linear` computes degrees 0 and 1 exactly, by d + 1 more coordinates (1, x), and draws degrees from 2 on: at small
logits, where these two are nearly all of the kernel, little noise is left. Estimates are signed. Where a row sum is
below its noise the row is drawn to the mean of the values, see attnlens.linalg.signed_features; `held` tells which rows
are. Every row adds up to one.

Sources: "Random Feature Maps for Dot Product Kernels" (Kar, Karnick, 2012), whose H0/1 are the exact low degrees;
"Macformer: Transformer with Random Maclaurin Feature Attention" (Guo, Ding, Yuan, Wang, 2024),
https://arxiv.org/abs/2408.11656. Departures: systematic in place of independent degrees; exact low degrees unless
turned off; the Poisson measure; the floor; no scaling of queries and keys by statistics of the batch (its ppSBN), which
mixes examples.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.leveled_features import (
    LeveledState,
    empty_leveled,
    held_leveled,
    leveled,
    leveled_attention,
    leveled_step,
)
from attnlens.linalg.maclaurin_features import (
    capacities,
    coefficients,
    degree_measure,
    draw_factors,
    maclaurin_features,
    systematic_degrees,
)


class Maclaurin(AbstractRecurrentAttention):
    """Attention by random Maclaurin features, with its own draw for every head.

    Args:
        num_features: random features m, at least 1.
        head_dim: of queries and keys.
        num_heads: every head has its own draw.
        seed: of the draws.
        radius: None for geometric degrees, P(N) = 2^{-(N+1)}; else positive, the length d^{-1/4} |q| of queries and
            keys for which degrees are best, Poisson of mean radius^2.
        exact_linear: whether degrees 0 and 1 are computed exactly, by d + 1 more coordinates; the paper draws them.
        max_degree: the largest degree, at least 1 (2 with `exact_linear`), at most 32.
    """

    family = "random features"
    budget = "num_features"
    order = 0.5
    unbiased = True

    def __init__(
        self,
        num_features: int,
        head_dim: int,
        num_heads: int,
        seed: int,
        radius: float | None = None,
        exact_linear: bool = True,
        max_degree: int = 24,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"`num_features` must be at least 1, got {num_features}")
        if radius is not None and not radius > 0:
            raise ValueError(f"`radius` must be positive, got {radius}; None means geometric degrees")
        least = 2 if exact_linear else 1
        if not least <= max_degree <= 32:
            raise ValueError(f"`max_degree` must be {least} to 32, got {max_degree}")
        self.exact_linear = exact_linear
        generator = torch.Generator().manual_seed(seed)
        self.measure = degree_measure(max_degree, 2 if exact_linear else 0, radius)
        self.widths = capacities(self.measure, num_features)
        offset = torch.rand(num_heads, dtype=torch.float64, generator=generator, device="cpu")
        degrees = systematic_degrees(self.measure, num_features, offset)
        scales = coefficients(degrees, self.measure)
        self.degrees: Tensor
        self.scales: Tensor
        self.factors: Tensor
        self.register_buffer("degrees", degrees)
        self.register_buffer("scales", scales.float())
        self.register_buffer("factors", draw_factors(degrees, scales, self.widths, head_dim, generator).float())

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """<phi(x_i), phi(y_j)>, the estimate of exp(<q_i, k_j>/sqrt(d))."""
        return self.features(q) @ self.features(k).mT

    def held(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Bool[Tensor, "b h n"]:
        """Which rows have a sum below its noise, and are drawn to the mean of the values."""
        f_x, (f_y, log_scale) = leveled(self.features(q))[0], leveled(self.features(k))
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return held_leveled(f_x, f_y, log_scale, **masks, exact=self._exact())

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        f_x, (f_y, log_scale) = leveled(self.features(q))[0], leveled(self.features(k))
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return leveled_attention(f_x, f_y, log_scale, v, **masks, exact=self._exact())

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> LeveledState:
        """Empty sums."""
        return empty_leveled(batch, num_heads, self.degrees.shape[1] + self._exact(), value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[LeveledState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n m (E N d + dv)), whatever came before."""
        past = LeveledState(*state)
        dtype = past.moment.dtype
        f_x, (f_y, log_scale) = (leveled(self.features(x.to(dtype))) for x in (q, k))
        after, out = leveled_step(past, f_x[0], f_y, log_scale, v.to(dtype), self._exact())
        return after, out.to(q.dtype)

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n r"]:
        """phi of queries or keys, behind (1, x) with `exact_linear`."""
        num_heads, _, head_dim = self.factors.shape
        if (x.shape[1], x.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`q` has {x.shape[1]} heads of {x.shape[3]}, but the draws are for {num_heads} heads of {head_dim}: "
                "build with the `num_heads` and `head_dim` of the input"
            )
        x = x * x.shape[-1] ** -0.25
        phi = maclaurin_features(x, self.factors, self.degrees, self.scales, self.widths)
        return torch.cat([torch.ones_like(x[..., :1]), x, phi], -1) if self.exact_linear else phi

    def _exact(self) -> int:
        """How many leading coordinates carry no noise."""
        return self.factors.shape[-1] + 1 if self.exact_linear else 0
