"""PolaFormer: linear attention that keeps both signs of queries and keys, in a same-sign and an opposite-sign stream.

    x+ = relu(x/s)^g,   x- = relu(-x/s)^g,   g = 1 + alpha sigmoid(w),   s = softplus(u)/log 2   (by channel),
    same_i = sum_j <[q_i+, q_i-], [k_j+, k_j-]> v_j / sum_j <[q_i+, q_i-], [k_j+, k_j-]>   on the first values,
    opposite_i likewise with [q_i-, q_i+], on the last values;   out_i = [G_1 same_i, G_2 opposite_i];   causal: j <= i.

Weights are nonnegative in both streams, and at g = s = 1 their difference is the inner product: <[q+, q-], [k+, k-]> -
<[q-, q+], [k+, k-]> = <q, k>. Sums over j first: time O(n d dv), memory O(n d), a causal state of 2 d (dv + 2) numbers.
An attention of its own: it approximates softmax in no limit; its target is its own definition, pair by pair. A row that
meets no key in a stream (a first token whose signs are all opposite, say) is zero there.

Source: "PolaFormer: Polarity-aware Linear Attention for Vision Transformers" (Meng, Luo, Li, Jiang, Zhang, 2025),
https://arxiv.org/abs/2501.15061. Departures: one learned gate G a head and stream, where the paper computes a gate for
every token and channel from the layer's input, which an operator does not see; no depthwise convolution of the values,
which is the projection's; no constant in the denominator; scales that start at one (paper: log 2);
the causal form, by prefix sums.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.prefix import PrefixState, causal_kernel_attention, kernel_attention, normalized


class PolaState(NamedTuple):
    """The sums over keys so far of each stream: on the first values and on the last ones."""

    same_moment: Float[Tensor, "b h f dv1"]
    same_mass: Float[Tensor, "b h f"]
    opposite_moment: Float[Tensor, "b h f dv2"]
    opposite_mass: Float[Tensor, "b h f"]


def polarized(
    x: Float[Tensor, "b h n d"], exponent: Float[Tensor, "h d"], scale: Float[Tensor, "h d"]
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
    """x+ and x-."""
    x, power = x / scale[:, None], exponent[:, None]
    return F.relu(x).pow(power), F.relu(-x).pow(power)


def polaformer_naive(
    queries: tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]],
    keys: tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool = False,
) -> tuple[Float[Tensor, "b h n dv1"], Float[Tensor, "b h n dv2"]]:
    """Both streams pair by pair, with their matrices materialized."""
    first = (v.shape[-1] + 1) // 2
    outs = []
    for query, values in ((queries, v[..., :first]), (queries[::-1], v[..., first:])):
        weights = query[0] @ keys[0].mT + query[1] @ keys[1].mT
        weights = weights.tril() if causal else weights
        outs.append(normalized(weights @ values, weights.sum(-1)))
    return outs[0], outs[1]


class PolaFormer(AbstractRecurrentAttention):
    """Polarity-aware linear attention with learned exponents, scales and gates.

    Args:
        head_dim: of queries and keys.
        num_heads: every head learns its own.
        alpha: the largest exponent is 1 + alpha, at least 0; exponents start at 1 + alpha/2.
    """

    family = "kernel"
    target = "itself"

    def __init__(self, head_dim: int, num_heads: int, alpha: int | float = 4) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"`alpha` must be at least 0, got {alpha}; the paper takes 3 to 4")
        self.alpha = alpha
        self.exponent = nn.Parameter(torch.zeros(num_heads, head_dim, device="cpu"))
        self.scale = nn.Parameter(torch.zeros(num_heads, head_dim, device="cpu"))
        self.gate = nn.Parameter(torch.ones(num_heads, 2, device="cpu"))

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
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            k, v = torch.where(real, k, 0), torch.where(real, v, 0)
        return self._gated(*polaformer_naive(self._polarized(q), self._polarized(k), v, causal=causal))

    def matrix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """The mean of the two streams' matrices, each with its gate: no single matrix acts on all values."""
        eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], k.shape[-2])
        # Values [I, I]: every stream is applied to a whole identity.
        both = self(q, k, torch.cat([eye, eye], -1), causal=causal, key_padding_mask=key_padding_mask)
        return both.unflatten(-1, (2, -1)).mean(-2)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        # A padded key is zero, and so are its features.
        if causal:
            return self._causal(q, k, v, None, final_state=False)[1]
        same, opposite, keys = self._streams(q, k)
        first = (v.shape[-1] + 1) // 2
        outs = (kernel_attention(same, keys, v[..., :first]), kernel_attention(opposite, keys, v[..., first:]))
        return self._gated(*outs)

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> PolaState:
        """Empty sums."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        mass = torch.zeros(batch, num_heads, 2 * head_dim, dtype=dtype, device=like.device)
        first = (value_dim + 1) // 2
        widths = (first, value_dim - first)
        moments = [mass.new_zeros(*mass.shape, width) for width in widths]
        return PolaState(moments[0], mass, moments[1], mass.clone())

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[PolaState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n d dv), whatever came before."""
        past = PolaState(*state)
        dtype = past.same_mass.dtype
        after, out = self._causal(q.to(dtype), k.to(dtype), v.to(dtype), past, final_state=True)
        assert after is not None
        return after, out.to(q.dtype)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, past: PolaState | None, final_state: bool
    ) -> tuple[PolaState | None, Tensor]:
        same, opposite, keys = self._streams(q, k)
        first = (v.shape[-1] + 1) // 2
        states = (None, None) if past is None else (PrefixState(*past[:2]), PrefixState(*past[2:]))
        parts = ((same, v[..., :first], states[0]), (opposite, v[..., first:], states[1]))
        after, outs = zip(
            *(causal_kernel_attention(query, keys, values, state, final_state) for query, values, state in parts),
            strict=True,
        )
        new = PolaState(*after[0], *after[1]) if final_state else None
        return new, self._gated(*outs)

    def _streams(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[q+, q-], [q-, q+] and [k+, k-]."""
        positive, negative = self._polarized(q)
        keys = torch.cat(self._polarized(k), -1)
        return torch.cat([positive, negative], -1), torch.cat([negative, positive], -1), keys

    def _polarized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        num_heads, head_dim = self.exponent.shape
        if (x.shape[1], x.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`q` has {x.shape[1]} heads of {x.shape[3]}, but there are exponents for {num_heads} heads of "
                f"{head_dim}: build with the `num_heads` and `head_dim` of the input"
            )
        exponent = 1 + self.alpha * torch.sigmoid(self.exponent.to(x.dtype))
        return polarized(x, exponent, F.softplus(self.scale.to(x.dtype)) / math.log(2))

    def _gated(self, same: Tensor, opposite: Tensor) -> Tensor:
        gate = self.gate.to(same.dtype)[:, :, None, None]
        return torch.cat([same * gate[:, 0], opposite * gate[:, 1]], -1)
