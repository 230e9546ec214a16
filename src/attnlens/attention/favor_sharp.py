"""FAVOR#: Performer with positive features fitted to the queries and keys it meets.

    out_i = sum_j <phi(x_i), phi(y_j)> v_j / sum_j <phi(x_i), phi(y_j)>,   x = d^{-1/4} q,   y = d^{-1/4} k,
    phi_f(x) = D m^{-1/2} exp(w_f^T A w_f + <B w_f, R^T x> - |x|^2/2),   w_f ~ N(0, I),   j <= i if causal,
    A = diag(a) <= 0,   B = (I - 4 A)^{1/2},   D = det(I - 4 A)^{1/4}.

Unbiased for the softmax kernel for any A and orthogonal R; `fit` sets both to what minimizes the mean logarithm of the
second moment over pairs of calibration queries and keys (`linalg.exponential_features`), and saves them with the model.
Before, A = 0 and this is `performer`. In the pass w_f^T A w_f belongs to the feature and costs nothing: time O(n m d),
memory O(n d + m d), as there, plus two rotations of the draws. Reaches softmax for no finite m; the error falls like
m^{-1/2}.

Source: "FAVOR#: Sharp Attention Kernel Approximations via New Classes of Positive Random Features" (Likhosherstov,
Choromanski, Dubey, Liu, Sarlos, Weller, 2023), https://arxiv.org/abs/2302.00787. Departures: statistics come from
calibration data, since those of the tokens at hand would let the future into causal outputs and mix examples; w are
orthogonal within blocks unless asked otherwise, which leaves each w_f Gaussian and the estimate unbiased.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.exponential_features import optimal_coefficients, pair_moment
from attnlens.linalg.feature_maps import log_linear
from attnlens.linalg.feature_scan import (
    FeatureState,
    LogLinear,
    bidirectional_features,
    causal_features,
    empty_features,
)
from attnlens.linalg.random_features import gaussian_projections, positive_log_features


class FavorSharp(AbstractRecurrentAttention):
    """Fitted positive random features with their own draw for every head.

    Args:
        num_features: random features m, at least 1; multiples of `head_dim` fill their orthogonal blocks.
        head_dim: of queries and keys.
        num_heads: every head has its own draw and its own fit.
        seed: of the draws.
        orthogonal: orthogonal within blocks of `head_dim` features instead of independent.
        isotropic: one coefficient a for all directions of a head, the FAVOR++ of "Chefs' Random Tables".
    """

    family = "random features"
    budget = "num_features"
    row_stochastic = True
    order = 0.5
    unbiased = True

    def __init__(
        self,
        num_features: int,
        head_dim: int,
        num_heads: int,
        seed: int,
        orthogonal: bool = True,
        isotropic: bool = False,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"`num_features` must be at least 1, got {num_features}; multiples of head_dim are best")
        self.isotropic = isotropic
        generator = torch.Generator().manual_seed(seed)
        draws = [
            gaussian_projections(num_features, head_dim, orthogonal=orthogonal, generator=generator)
            for _ in range(num_heads)
        ]
        self.projections: Tensor
        self.coefficients: Tensor
        self.rotation: Tensor
        self.register_buffer("projections", torch.stack(draws).float())
        self.register_buffer("coefficients", torch.zeros(num_heads, head_dim, device="cpu"))
        self.register_buffer("rotation", torch.eye(head_dim, device="cpu").repeat(num_heads, 1, 1))

    def calibrate(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> bool:
        """By `fit`."""
        self.fit(q, k, key_padding_mask)
        return True

    def fit(
        self,
        queries: Float[Tensor, "b h n d"],
        keys: Float[Tensor, "b h m d"],
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "h"]:
        """Set A and R from calibration queries and keys, as the operator receives them; saved with the state.

        With `key_padding_mask` queries and keys are the same tokens.

        Returns:
            For every head the mean logarithm of the relative second moment over the pairs given, that of `performer`
            less the fitted one: what was gained.

        Raises:
            ValueError: tensors of other heads or another head_dim than the operator was built for.
        """
        expected = tuple(self.coefficients.shape)
        for name, x in (("queries", queries), ("keys", keys)):
            if (x.shape[1], x.shape[3]) != expected:
                raise ValueError(f"`{name}` must have {expected} heads and dimensions, got {tuple(x.shape)}")
        scale = queries.shape[-1] ** -0.25
        moment = pair_moment(queries * scale, keys * scale, key_padding_mask)
        energy, directions = torch.linalg.eigh(moment)
        energy = energy.clamp_min(0)
        level = energy.mean(-1, keepdim=True).expand_as(energy) if self.isotropic else energy
        a = optimal_coefficients(level)
        self.coefficients.copy_(a)
        self.rotation.copy_(directions)
        # The logarithm is linear in the squares of the coordinates: its mean is its value at their means.
        fitted = torch.log1p(-4 * a) - torch.log1p(-8 * a) / 2 + (2 * (1 - 4 * a) / (1 - 8 * a) - 1) * energy
        return (energy - fitted).sum(-1)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        if causal:
            return causal_features(self._log_linear(q), q, k, v, key_padding_mask)[1]
        return bidirectional_features(self._log_linear(q), q, k, v, key_padding_mask)

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """<phi(x_i), phi(y_j)>, the estimate of exp(<q_i, k_j>/sqrt(d))."""
        scale, (rows, offset) = q.shape[-1] ** -0.25, self._draws(q)
        log_x, log_y = (positive_log_features(x * scale, rows) + offset[:, :, None] / 2 for x in (q, k))
        return log_x.exp() @ log_y.exp().mT

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> FeatureState:
        """No key so far: every mass is zero."""
        return empty_features(batch, num_heads, self.projections.shape[1], value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[FeatureState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n m d), whatever came before."""
        past = FeatureState(*state)
        queries, keys, values = (x.to(past.log_mass.dtype) for x in (q, k, v))
        features = self._log_linear(queries)
        after, out = causal_features(features, queries, keys, values, state=past, final_state=True)
        assert after is not None
        return after, out.to(q.dtype)

    def _log_linear(self, q: Tensor) -> LogLinear:
        """What both tokens of a pair owe to the draw alone goes to the keys."""
        rows, offset = self._draws(q)
        return log_linear(rows)._replace(shift=offset)

    def _draws(self, q: Tensor) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m"]]:
        """R B w_f, and 2 w_f^T A w_f + 2 log D, of every head in the precision of q."""
        num_heads, _, head_dim = self.projections.shape
        if (q.shape[1], q.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`q` has {q.shape[1]} heads of {q.shape[3]}, but the draws are for {num_heads} heads of {head_dim}: "
                "build with the `num_heads` and `head_dim` of the input"
            )
        w, a, rotation = (x.to(q.dtype) for x in (self.projections, self.coefficients, self.rotation))
        a = a[:, None]
        rows = (w * (1 - 4 * a).sqrt()) @ rotation.mT
        offset = 2 * (w.square() * a).sum(-1) + torch.log1p(-4 * a).sum(-1) / 2
        return rows.expand(q.shape[0], -1, -1, -1), offset.expand(q.shape[0], -1, -1)
