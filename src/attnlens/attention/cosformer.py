"""cosFormer: linear attention with ReLU features, weighed by the cosine of the distance between positions.

    out_i = sum_j w_ij v_j / sum_j w_ij,   w_ij = <relu(q_i), relu(k_j)> cos(pi (i - j) / (2 M)),

over j <= i if causal. With theta_i = pi i / (2 M), cos(theta_i - theta_j) = cos cos + sin sin: the features of q and k
are relu(x_i) cos(theta_i) next to relu(x_i) sin(theta_i), 2 d of them, and sums over j come first. Time O(n d dv),
memory O(n d), a causal state of 2 d (dv + 1) numbers and a position. An attention of its own: it approximates softmax
in no limit, and its target is its own definition, evaluated pair by pair in float64.

Positions lie in [0, M), so every angle is in [0, pi/2): no feature is negative and no sum cancels. Rows sum to one,
except where a query and all keys have no positive channel in common: such a row is zero.

Source: "cosFormer: Rethinking Softmax in Attention" (Qin et al., 2022), https://arxiv.org/abs/2202.08791.

Departures from the paper. M is a constant, `max_length`. Published code takes the length of the input, so that a longer
input changes the weights of its first tokens, which no state can follow and which lets a causal model see how much
comes. No constant is added to the normalizer. Positions count real tokens; with fewer queries than keys, q are the last
tokens.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.decay import masked_tokens
from attnlens.linalg.prefix import PrefixState, causal_kernel_attention, empty_prefix, kernel_attention, normalized


class CosformerState(NamedTuple):
    """The sums over the keys so far and the position of the next token."""

    moment: Float[Tensor, "b h m dv"]
    mass: Float[Tensor, "b h m"]
    position: Int[Tensor, ""]


def cosine_features(
    x: Float[Tensor, "b h n d"], positions: Int[Tensor, "#b n"], max_length: int
) -> Float[Tensor, "b h n 2*d"]:
    """relu(x) cos(theta) and relu(x) sin(theta)."""
    angle = (positions.to(x.dtype) * (math.pi / (2 * max_length)))[:, None, :, None]
    x = x.relu()
    return torch.cat([x * angle.cos(), x * angle.sin()], -1)


def token_positions(k: Float[Tensor, "b h m d"], key_padding_mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, "#b m"]:
    """How many real tokens come before each."""
    if key_padding_mask is None:
        return torch.arange(k.shape[2], device=k.device)[None]
    return (key_padding_mask.cumsum(-1) - 1).clamp_min(0)


def cosformer_naive(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    max_length: int,
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """The definition, with its matrix materialized; in float64 when given float64. Padding is not read."""
    k, v = (masked_tokens(x, key_padding_mask) for x in (k, v))
    positions = token_positions(k, key_padding_mask).to(q.dtype)
    distance = positions[:, -q.shape[2] :, None] - positions[:, None, :]
    weights = (q.relu() @ k.relu().mT) * torch.cos(distance * (math.pi / (2 * max_length)))[:, None]
    weights = weights.tril() if causal else weights
    return normalized(weights @ v, weights.sum(-1))


class Cosformer(AbstractRecurrentAttention):
    """Kernel attention with ReLU features and a cosine of the distance; no parameter, no draw.

    Args:
        max_length: M, the longest input; at that distance a weight is zero.
    """

    family = "kernel"
    target = "itself"

    def __init__(self, max_length: int) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}")
        self.max_length = max_length

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """It is its own definition."""
        return {}

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """The definition pair by pair, in float64."""
        q, k, v = q.double(), k.double(), v.double()
        return cosformer_naive(q, k, v, self.max_length, causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        n, m = q.shape[2], k.shape[2]
        if n > m:
            raise ValueError(f"`q` has {n} tokens and `k` {m}: weights are of positions, and `q` are the last of them")
        self._check_length(m)
        positions = token_positions(k, key_padding_mask)
        f_q = cosine_features(q, positions[:, m - n :], self.max_length)
        # relu(0) = 0: padding, which is zero, has no weight.
        f_k = cosine_features(k, positions, self.max_length)
        return causal_kernel_attention(f_q, f_k, v)[1] if causal else kernel_attention(f_q, f_k, v)

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> CosformerState:
        """Empty sums, at position 0."""
        sums = empty_prefix(batch, num_heads, 2 * head_dim, value_dim, like)
        return CosformerState(*sums, torch.zeros((), dtype=torch.long, device=like.device))

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[CosformerState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n d dv), whatever came before.

        Raises:
            ValueError: more than `max_length` tokens so far; to know, the position is read back from the device.
        """
        past, n = CosformerState(*state), q.shape[2]
        self._check_length(int(past.position) + n)
        dtype = past.mass.dtype
        positions = (past.position + torch.arange(n, device=q.device))[None]
        f_q, f_k = (cosine_features(x.to(dtype), positions, self.max_length) for x in (q, k))
        sums = PrefixState(past.moment, past.mass)
        after, out = causal_kernel_attention(f_q, f_k, v.to(dtype), sums, final_state=True)
        assert after is not None
        return CosformerState(*after, past.position + n), out.to(q.dtype)

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(f"length {length} is beyond `max_length`={self.max_length}: build with a larger one")
