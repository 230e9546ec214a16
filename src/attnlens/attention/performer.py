"""Performer: softmax attention with the kernel replaced by an unbiased estimate from random features (FAVOR+).

    out_i = sum_j <phi(x_i), phi(y_j)> v_j / sum_j <phi(x_i), phi(y_j)>,   x = d^{-1/4} q,   y = d^{-1/4} k,
    phi_f(y) = m^{-1/2} exp(<w_f, y> - |y|^2/2),   w_f ~ N(0, I), orthogonal within blocks of d,   j <= i if causal.

The sums over j are taken first, feature by feature, so time is O(n m d) instead of O(n^2 d); memory is O(n d + m d),
causal O(c m) more for pieces of c tokens, and O(n m) to a backward pass. The kernel estimate is unbiased with relative
variance at most (e^{|x + y|^2} - 1) / m, so that the error falls like m^{-1/2}; it equals softmax attention for no
finite m. At |x + y|^2 >> log m (unit Gaussian queries and keys at d = 64 have 16) it carries no information: see skill.

`features` chooses the map: positive as above, hyperbolic (draws in opposite pairs, a smaller variance at twice the
features) or trigonometric (signed: a smaller variance for near pairs, a much larger one for far pairs).

Source: "Rethinking Attention with Performers" (Choromanski et al., 2021), https://arxiv.org/abs/2009.14794.

Departures from the paper. Its stabilizer subtracts a maximum over all keys and adds 1e-4 to every feature: the
constant swamps the features (the output becomes mean(V)) and the maximum lets the future into causal outputs. Nothing
is added here and no scale is shared: see `linalg.feature_scan`. Rows sum to one to round-off; signed ones below their
noise are drawn to the mean of the values (`linalg.signed_features`).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.feature_maps import AbstractFeatureMap, Positive
from attnlens.linalg.random_features import gaussian_projections


class Performer(AbstractRecurrentAttention):
    """Random features of the softmax kernel with their own draw for every head.

    Args:
        num_features: random features m, at least 1; multiples of `head_dim` fill their orthogonal blocks.
        head_dim: of queries and keys.
        num_heads: every head has its own draw.
        seed: of the draws.
        orthogonal: orthogonal within blocks of `head_dim` features instead of independent.
        features: the map; positive by default.
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
        features: AbstractFeatureMap | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"`num_features` must be at least 1, got {num_features}; multiples of head_dim are best")
        self.features = Positive() if features is None else features
        # What the class declares holds for positive features.
        self.row_stochastic = self.features.row_stochastic  # pyright: ignore[reportAttributeAccessIssue]
        generator = torch.Generator().manual_seed(seed)
        draws = [
            gaussian_projections(num_features, head_dim, orthogonal=orthogonal, generator=generator)
            for _ in range(num_heads)
        ]
        self.projections: Tensor
        self.register_buffer("projections", torch.stack(draws).float())

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return self.features.attend(q, k, v, self._draws(q), causal=causal, key_padding_mask=key_padding_mask)

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """<phi(x_i), phi(y_j)>, the estimate of exp(<q_i, k_j>/sqrt(d))."""
        scale, w = q.shape[-1] ** -0.25, self._draws(q)
        return self.features.features(q * scale, w) @ self.features.features(k * scale, w).mT

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> tuple:
        """No key so far."""
        return self.features.init_state(batch, num_heads, self.projections.shape[1], value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[tuple, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n m d), whatever came before."""
        dtype = state[0].dtype
        queries, keys, values = (x.to(dtype) for x in (q, k, v))
        after, out = self.features.step(state, queries, keys, values, self._draws(queries))
        return after, out.to(q.dtype)

    def _draws(self, q: Tensor) -> Float[Tensor, "b h m d"]:
        """The draws of every head, in the precision of q."""
        num_heads, _, head_dim = self.projections.shape
        if (q.shape[1], q.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`q` has {q.shape[1]} heads of {q.shape[3]}, but the draws are for {num_heads} heads of {head_dim}: "
                "build with the `num_heads` and `head_dim` of the input"
            )
        return self.projections.to(q.dtype).expand(q.shape[0], -1, -1, -1)
