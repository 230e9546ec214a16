"""FMMformer: a band of softmax attention near the diagonal and linear attention everywhere, in learned proportions.

    out_i = w D_i V + (1 - w) (1 / r) sum_{l <= r} L^l_i V,      w = sigmoid(theta), one theta a head,
    D_ij = e^{s <q_i, k_j>} / sum_{j' in P_i} e^{s <q_i, k_j'>},   P_i = {j : |i - j| < window},   s = 1/sqrt(d),
    L^l_ij = <f_l(q_i), f_l(k_j)> / sum_j' <f_l(q_i), f_l(k_j')>,   f_1(x) = elu(x) + 1,   f_2(x) = elu(-x) + 1,

with j <= i throughout if causal. The matrix is a band plus one of rank r d at most, both with rows that sum to one. The
far field reads the near keys as well. Time O(n (window + r d) d), memory O(n (window + d)).

An attention of its own: D is softmax attention when window >= n, the mixture is not, in no limit. Its target is its own
definition, evaluated pair by pair in float64.

Source: "FMMformer: Efficient and Flexible Transformer via Decomposed Near-field and Far-field Attention" (Nguyen,
Suliafu, Osher, Chen, Wang, 2021), https://arxiv.org/abs/2108.02347. Departures: the paper's two weights are free, here
they are convex, so that rows sum to one, and start at one half; its third feature map, tanh, gives negative weights and
a normalizer that may vanish, and is left out; the kernels are averaged, so that the scale does not grow with r.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.attention.linear import elu_features, linear_naive, query_features
from attnlens.linalg.band import band
from attnlens.linalg.prefix import causal_kernel_attention, kernel_attention

SIGNS = (1, -1)


def near_far_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    near_weight: Float[Tensor, "h"],
    window: int,
    num_kernels: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The band and the mean of the kernels' outputs, in the proportions of every head."""
    weight = near_weight[:, None, None].to(q.dtype)
    out = weight * band(q, k, v, window, causal=causal, key_padding_mask=key_padding_mask)[0]
    for sign in SIGNS[:num_kernels]:
        f_q, f_k = query_features(sign * q), elu_features(sign * k)
        if key_padding_mask is not None:
            # A zero key is not a missing one: its features are ones.
            f_k = torch.where(key_padding_mask[:, None, :, None], f_k, 0)
        far = causal_kernel_attention(f_q, f_k, v)[1] if causal else kernel_attention(f_q, f_k, v)
        out = out + (1 - weight) / num_kernels * far
    return out


def near_far_naive(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    near_weight: Float[Tensor, "h"],
    window: int,
    num_kernels: int,
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """The definition, with its matrices materialized; in float64 when given float64. Padding is not read."""
    position = torch.arange(q.shape[2], device=q.device)
    gap = position[:, None] - position
    hidden = (gap.abs() >= window)[None, None]
    hidden = hidden | (gap < 0) if causal else hidden
    values = v
    if key_padding_mask is not None:
        real = key_padding_mask[:, None, :, None]
        hidden, k, values = hidden | ~real.mT, torch.where(real, k, 0), torch.where(real, v, 0)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    near = torch.softmax(scores, -1).masked_fill(hidden, 0) @ values
    maps = [
        linear_naive(sign * q, sign * k, v, causal=causal, key_padding_mask=key_padding_mask)
        for sign in SIGNS[:num_kernels]
    ]
    weight = near_weight[:, None, None]
    return weight * near + (1 - weight) * torch.stack(maps).mean(0)


class NearFar(AbstractAttention):
    """Band and low-rank attention, blended.

    Args:
        window: positions a row sees on each side in the band, its own included, at least 1.
        num_heads: each has its own proportion.
        num_kernels: feature maps of the far field: elu(x) + 1, and with 2 also elu(-x) + 1.
    """

    family = "hierarchical"
    budget = "window"
    target = "itself"
    self_attention = True
    row_stochastic = True

    def __init__(self, window: int, num_heads: int, num_kernels: int = 2) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"`window` must be at least 1 (the row's own key), got {window}")
        if not 1 <= num_kernels <= len(SIGNS):
            raise ValueError(f"`num_kernels` must be 1 or 2, got {num_kernels}")
        self.window, self.num_kernels = window, num_kernels
        self.theta = nn.Parameter(torch.zeros(num_heads))

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
        kinds = torch.sigmoid(self.theta.double()), self.window, self.num_kernels
        tensors = q.double(), k.double(), v.double()
        return near_far_naive(*tensors, *kinds, causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        kinds = torch.sigmoid(self.theta), self.window, self.num_kernels
        return near_far_attention(q, k, v, *kinds, causal=causal, key_padding_mask=key_padding_mask)
