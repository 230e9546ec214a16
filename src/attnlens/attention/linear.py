"""Linear attention: the exponential kernel replaced by an inner product of elu(x) + 1 features.

    out_i = sum_j <f(q_i), f(k_j)> v_j / sum_j <f(q_i), f(k_j)>,   f(x) = elu(x) + 1 = x + 1 if x > 0, else e^x,

over j <= i if causal. The sums over j are taken before the product with f(q_i): time O(n d dv) instead of O(n^2 d),
a causal state of d (dv + 1) numbers. An attention of its own: it approximates softmax in no limit, and its target is
its own definition, evaluated pair by pair in float64.

Source: "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (Katharopoulos et al., 2020),
https://arxiv.org/abs/2006.16236.

Departures from the paper. It computes elu(x) + 1 literally, which float32 rounds to zero at x < -17, and adds 1e-6
to the normalizer; here negative x go through the exponential, an all-negative query is shifted (which cancels) and
features are held above the square root of the smallest normal number, so that the normalizer is positive without a
constant and rows sum to one.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.blocks import in_pieces
from attnlens.linalg.prefix import PrefixState, causal_kernel_attention, empty_prefix, kernel_attention


def elu_features(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """elu(x) + 1 with full relative accuracy for negative x, at least sqrt(tiny)."""
    floor = math.log(torch.finfo(x.dtype).tiny) / 2
    return F.relu(x) + x.clamp(floor, 0).exp()


def query_features(q: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    """elu(q) + 1 up to a positive factor of each query, with the largest entry at least 1.

    A query whose entries are all negative is shifted up to zero first, which multiplies its features by a constant.
    """
    return elu_features(q - q.detach().amax(-1, keepdim=True).clamp_max(0))


def linear_naive(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """The definition, with its matrix materialized; in float64 when given float64. Padding is not read."""
    # Not elu(x) + 1, whose sum loses all of e^x at x < -37.
    f_q, f_k = (F.relu(x) + x.clamp_max(0).exp() for x in (q, k))
    weights = f_q @ f_k.mT
    if key_padding_mask is not None:
        real = key_padding_mask[:, None]
        weights, v = torch.where(real[..., None, :], weights, 0), torch.where(real[..., None], v, 0)
    if causal:
        weights = weights.tril()
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total == 0, 1, total)


class Linear(AbstractRecurrentAttention):
    """Kernel attention with elu + 1 features; no parameter, no draw."""

    family = "kernel"
    target = "itself"
    row_stochastic = True

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
        return linear_naive(q.double(), k.double(), v.double(), causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        f_q, f_k = in_pieces(query_features, q), in_pieces(elu_features, k)
        if key_padding_mask is not None:
            # A zero key is not a missing one: its features are ones.
            f_k = torch.where(key_padding_mask[:, None, :, None], f_k, 0)
        if causal:
            return causal_kernel_attention(f_q, f_k, v)[1]
        return kernel_attention(f_q, f_k, v)

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> PrefixState:
        """Empty sums."""
        return empty_prefix(batch, num_heads, head_dim, value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[PrefixState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n d dv), whatever came before."""
        past = PrefixState(*state)
        dtype = past.mass.dtype
        f_q, f_k = query_features(q.to(dtype)), elu_features(k.to(dtype))
        after, out = causal_kernel_attention(f_q, f_k, v.to(dtype), past, final_state=True)
        assert after is not None
        return after, out.to(q.dtype)
