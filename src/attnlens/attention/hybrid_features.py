"""Hybrid random features: softmax attention with the kernel estimated from positive and trigonometric features at once.

    out_i = sum_j K_ij v_j / sum_j K_ij,   K = L SM_+ + (1 - L) SM_trig,   x = d^{-1/4} q,   y = d^{-1/4} k,
    L_ij = 1/2 - (1/2k) sum_r sgn <u_r, x_i> sgn <u_r, y_j>,   E L = angle(x_i, y_j)/pi,   j <= i if causal,

SM_+ and SM_trig the positive and the trigonometric estimate of exp(<x, y>) from the same m frequencies, k planes u_r.
SM_+ is exact at y = -x and SM_trig at y = x: the weights give each pair the better one. All is an inner product of
6 m k features, see attnlens.linalg.angular_hybrid, and sums over j come first: time O(n m (d + k dv)), memory O(n m k),
a causal state of (6 m k + 1)(dv + 1) + 2 numbers. Softmax attention, reached for no finite m.

Unbiased, with a variance in closed form that is, at k = 1, lambda times that of SM_+ and 1 - lambda times that of
SM_trig: the error falls like m^{-1/2} for every k. The largest relative variance over all angles is smaller than that
of either, but 6 k coordinates a frequency are paid for it, where positive features have one.

Estimates are signed. Where a row sum is below its noise the row is drawn to the mean of the values, see
attnlens.linalg.signed_features; `held` tells which rows are. Every row adds up to one. e^{|y|^2/2} leaves the range of
float32 at |y| = 13: every key carries the logarithm of its scale. L has no gradient: that of the estimate lacks what
comes through the angle.

Source: "Hybrid Random Features" (Choromanski et al., 2022), https://arxiv.org/abs/2110.04367, its angular hybrid.
Departures: the same frequencies for both estimates, whose covariance is negative; the floor; scales of keys.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.angular_hybrid import LeveledFeatures, hybrid_features
from attnlens.linalg.leveled_features import (
    LeveledState,
    empty_leveled,
    held_leveled,
    leveled_attention,
    leveled_step,
)
from attnlens.linalg.random_features import gaussian_projections


class HybridFeatures(AbstractRecurrentAttention):
    """The angular hybrid with its own draw for every head.

    Args:
        num_features: frequencies m, at least 1, each with three coordinates: one positive, a sine and a cosine.
        num_planes: planes k of the angle, at least 1; the coordinates are 6 m k.
        head_dim: of queries and keys.
        num_heads: every head has its own draw.
        seed: of the draws.
        orthogonal: frequencies, and planes, orthogonal within blocks of `head_dim` instead of independent.
    """

    family = "random features"
    budget = "num_features"
    order = 0.5
    unbiased = True

    def __init__(
        self,
        num_features: int,
        num_planes: int,
        head_dim: int,
        num_heads: int,
        seed: int,
        orthogonal: bool = True,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"`num_features` must be at least 1, got {num_features}")
        if num_planes < 1:
            raise ValueError(f"`num_planes` must be at least 1, got {num_planes}; without an angle use performer")
        generator = torch.Generator().manual_seed(seed)
        num_draws = (num_features, num_planes)
        draws = [
            torch.stack(
                [
                    gaussian_projections(m, head_dim, orthogonal=orthogonal, generator=generator)
                    for _ in range(num_heads)
                ]
            )
            for m in num_draws
        ]
        self.projections: Tensor
        self.planes: Tensor
        self.register_buffer("projections", draws[0].float())
        self.register_buffer("planes", draws[1].float())

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """K of this draw, the estimate of exp(<q_i, k_j>/sqrt(d))."""
        (f_x, scale_x), (f_y, scale_y) = self._features(q, k)
        return f_x @ f_y.mT * (scale_x[..., :, None] + scale_y[..., None, :]).exp()

    def held(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Bool[Tensor, "b h n"]:
        """Which rows have a sum below its noise, and are drawn to the mean of the values."""
        f_x, f_y = self._features(q, k)
        return held_leveled(f_x.values, *f_y, causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        f_x, f_y = self._features(q, k)
        return leveled_attention(f_x.values, *f_y, v, causal=causal, key_padding_mask=key_padding_mask)

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> LeveledState:
        """Empty sums."""
        num_coordinates = 6 * self.projections.shape[1] * self.planes.shape[1]
        return empty_leveled(batch, num_heads, num_coordinates, value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[LeveledState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n m (d + k dv)), whatever came before."""
        past = LeveledState(*state)
        dtype = past.moment.dtype
        f_x, f_y = self._features(q.to(dtype), k.to(dtype))
        after, out = leveled_step(past, f_x.values, *f_y, v.to(dtype))
        return after, out.to(q.dtype)

    def _features(self, q: Tensor, k: Tensor) -> tuple[LeveledFeatures, LeveledFeatures]:
        num_heads, _, head_dim = self.projections.shape
        if (q.shape[1], q.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`q` has {q.shape[1]} heads of {q.shape[3]}, but the draws are for {num_heads} heads of {head_dim}: "
                "build with the `num_heads` and `head_dim` of the input"
            )
        draws = [each.to(q.dtype).expand(q.shape[0], -1, -1, -1) for each in (self.projections, self.planes)]
        scale = head_dim**-0.25
        return hybrid_features(q * scale, *draws, keys=False), hybrid_features(k * scale, *draws, keys=True)
