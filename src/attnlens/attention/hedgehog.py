"""Hedgehog: linear attention with a learned feature map of exponentials, to be trained to mimic softmax weights.

    out_i = sum_j <f(q_i), g(k_j)> v_j / sum_j <f(q_i), g(k_j)>,   f(x) = softmax([W x + b; -W x - b]) in R^{2d},

over j <= i if causal, and g with a map of its own. Time O(n d (d + dv)), memory O(n d), a causal state of 2 d (dv + 1)
numbers. An attention of its own: its target is its own definition, evaluated pair by pair in float64. It approximates
softmax only as far as training makes it; `hedgehog_loss` is the paper's objective for that.

Source: "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (Zhang, Bhatia, Kumbong, Ré,
2024), https://arxiv.org/abs/2402.04347.

Departures from the paper. Its features are exp(W x + b) next to exp(-W x - b); here they are normalized, as in
flash-linear-attention (which doubles x besides). For a query a factor cancels; for a key it does not, but without it
e^{|W k|} leaves the range of float32, and a maximum over keys as stabilizer lets the future into causal outputs.
Features are held above the square root of the smallest normal number, so that the normalizer is positive and rows sum
to one.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.decay import masked_tokens
from attnlens.linalg.head_map import HeadMap
from attnlens.linalg.prefix import PrefixState, causal_kernel_attention, empty_prefix, kernel_attention, normalized


def hedgehog_features(y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 2*d"]:
    """softmax([y; -y]), every entry at least sqrt(tiny)."""
    floor = math.log(torch.finfo(y.dtype).tiny) / 2
    return torch.cat([y, -y], -1).log_softmax(-1).clamp_min(floor).exp()


def hedgehog_loss(
    weights: Float[Tensor, "*batch n m"], softmax_weights: Float[Tensor, "*batch n m"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the operator's `matrix` against softmax attention's, averaged over rows."""
    return -(softmax_weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(-1).mean()


class Hedgehog(AbstractRecurrentAttention):
    """Kernel attention with learned maps of queries and of keys, identities at first.

    Args:
        head_dim: of queries and keys.
        num_heads: every head has its own maps.
    """

    family = "kernel"
    target = "itself"
    row_stochastic = True

    def __init__(self, head_dim: int, num_heads: int) -> None:
        super().__init__()
        self.of_queries = _identity(num_heads, head_dim)
        self.of_keys = _identity(num_heads, head_dim)

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
        k, v = (masked_tokens(x.double(), key_padding_mask) for x in (k, v))
        f_q, f_k = self._features(q.double(), k)
        weights = f_q @ masked_tokens(f_k, key_padding_mask).mT
        weights = weights.tril() if causal else weights
        return normalized(weights @ v, weights.sum(-1))

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        f_q, f_k = self._features(q, k)
        # A zero key is not a missing one: its features are 1/(2 d) at first.
        f_k = masked_tokens(f_k, key_padding_mask)
        return causal_kernel_attention(f_q, f_k, v)[1] if causal else kernel_attention(f_q, f_k, v)

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> PrefixState:
        """Empty sums."""
        return empty_prefix(batch, num_heads, 2 * head_dim, value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[PrefixState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n d (d + dv)), whatever came before."""
        past = PrefixState(*state)
        dtype = past.mass.dtype
        f_q, f_k = self._features(q.to(dtype), k.to(dtype))
        after, out = causal_kernel_attention(f_q, f_k, v.to(dtype), past, final_state=True)
        assert after is not None
        return after, out.to(q.dtype)

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries and keys, by their own maps."""
        return hedgehog_features(self.of_queries(q)), hedgehog_features(self.of_keys(k))


def _identity(num_heads: int, head_dim: int) -> HeadMap:
    weight = torch.eye(head_dim, device="cpu").repeat(num_heads, 1, 1)
    return HeadMap(weight, torch.zeros(num_heads, 1, head_dim, device="cpu"))
