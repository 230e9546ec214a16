"""Nyströmformer: the softmax matrix from its rows and columns at a few landmarks.

    P ~ F C^+ B,   F = softmax(s Q K~^T),   C = softmax(s Q~ K~^T),   B = softmax(s Q~ K^T),   s = 1/sqrt(d),

where the landmarks Q~, K~ are the means over l consecutive segments of the example's real tokens. Time
O(n l (d + dv) + l^3), memory O(n d + l^2): neither F nor B is formed. With l >= n every token is its own landmark,
F = B = C = P and P P^+ P = P: softmax attention, which is then computed directly.

Source: "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention" (Xiong et al., 2021),
https://arxiv.org/abs/2102.03902.

Departures from the paper. C^+ is a ridge solve by default, several times faster than six steps of the paper's
iteration at equal error (`inverse` takes either, or none at ridge 0). A regularized inverse shrinks towards
zero, so that rows no longer sum to one; here it acts on B V - 1 mu^T and the mean mu of the values is added back,

    out = 1 mu^T + F C^+ (B V - 1 mu^T),

equal to F C^+ B V for the exact inverse (C 1 = 1), with unit row sums for every inverse and mean(V) in the limit of an
infinite ridge. Weights may be negative. Any length and any mask: segments differ in size by one at most. The depthwise
convolution over V that implementations add is no part of the operator: see the short convolution of the projection.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.landmarks import segment, segment_means
from attnlens.linalg.partial import partial_attention
from attnlens.linalg.pseudo_inverse import AbstractInverse, Ridge, penrose_residual


def nystrom_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    num_landmarks: int,
    inverse: AbstractInverse,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The formula above, and softmax attention for each example that has no more real tokens than landmarks."""
    if q.shape[2] <= num_landmarks:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)[0]
    landmarks_q, landmarks_k = landmarks(q, k, num_landmarks, key_padding_mask)
    columns, _ = partial_attention(landmarks_q, k, v, key_padding_mask=key_padding_mask)
    core = core_matrix(landmarks_q, landmarks_k)
    if key_padding_mask is None:
        mu = v.mean(2, keepdim=True)
        return mu + partial_attention(q, landmarks_k, inverse(core, columns - mu))[0]
    count = key_padding_mask.sum(-1)[:, None, None, None]
    direct = count <= num_landmarks
    # Equal tokens would make such a core singular; its result is not used, but its gradient would be NaN.
    core = torch.where(direct, torch.eye(num_landmarks, dtype=core.dtype, device=core.device), core)
    mu = v.sum(2, keepdim=True) / count.clamp_min(1)
    out = mu + partial_attention(q, landmarks_k, inverse(core, columns - mu))[0]
    rank = (key_padding_mask.cumsum(-1) - 1).clamp(0, num_landmarks - 1)
    return torch.where(direct, columns.take_along_dim(rank[:, None, :, None], 2), out)


def landmarks(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    num_landmarks: int,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h l d"], Float[Tensor, "b h l d"]]:
    """Q~ and K~: segment means of queries and of keys."""
    segments = segment(q.shape[2], num_landmarks, key_padding_mask, q.device)
    return segment_means(q, segments), segment_means(k, segments)


def core_matrix(
    landmarks_q: Float[Tensor, "b h l d"], landmarks_k: Float[Tensor, "b h l d"]
) -> Float[Tensor, "b h l l"]:
    """C."""
    return torch.softmax(landmarks_q @ landmarks_k.mT * landmarks_q.shape[-1] ** -0.5, -1)


class Nystromformer(AbstractAttention):
    """Nyström attention at segment means.

    Args:
        num_landmarks: l, at least 1.
        inverse: how C^+ is applied: `Ridge` (default) or `NewtonSchulz` of attnlens.linalg.pseudo_inverse.
    """

    family = "low rank"
    budget = "num_landmarks"
    causal = False
    self_attention = True
    rows_independent = False

    def __init__(self, num_landmarks: int, inverse: AbstractInverse | None = None) -> None:
        super().__init__()
        if num_landmarks < 1:
            raise ValueError(f"`num_landmarks` must be at least 1, got {num_landmarks}")
        self.num_landmarks = num_landmarks
        self.inverse = Ridge() if inverse is None else inverse

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every token its own landmark."""
        return {"num_landmarks": length}

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return nystrom_attention(q, k, v, self.num_landmarks, self.inverse, key_padding_mask)

    def residual(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h"]:
        """|C Z C - C| / |C| of the inverse Z in use: how far regularization or early stopping is from C^+."""
        core = core_matrix(*landmarks(q, k, self.num_landmarks, None))
        return penrose_residual(core, self.inverse(core, torch.eye(core.shape[-1]).to(core).expand_as(core)))
