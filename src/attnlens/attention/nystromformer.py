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
infinite ridge. Weights may be negative.

How much to regularize cannot be told from C: what amplifies noise on peaky inputs resolves smooth ones. So p pilot
queries, spread evenly over the sequence, attend exactly, and the term beside 1 mu^T is scaled, head by head, by the
alpha in [0, 1] that fits them best; of several ridges the one that fits best is taken. On the pilots the error is then
at most that of mean(V), which alpha = 0 is, whatever the inverse does elsewhere. p = 0 leaves the formula alone. Any
length and any mask: segments differ in size by one at most. The depthwise convolution over V that implementations add
is no part of the operator: see the short convolution of the projection.
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
    num_pilots: int,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The formula above, and softmax attention for each example that has no more real tokens than landmarks."""
    if q.shape[2] <= num_landmarks:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)[0]
    landmarks_q, landmarks_k = landmarks(q, k, num_landmarks, key_padding_mask)
    pilots = pilot_rows(q, num_pilots, key_padding_mask)
    rows = torch.cat([landmarks_q, pilots], 2)
    columns, exact = partial_attention(rows, k, v, key_padding_mask=key_padding_mask)[0].split(
        [num_landmarks, num_pilots], 2
    )
    core = core_matrix(landmarks_q, landmarks_k)
    if key_padding_mask is None:
        mu = v.mean(2, keepdim=True)
        solution = fitted(inverse.candidates(core, columns - mu), pilots, landmarks_k, exact - mu)
        # Rows of F sum to one, so that mu may be added before.
        return partial_attention(q, landmarks_k, mu + solution)[0]
    count = key_padding_mask.sum(-1)[:, None, None, None]
    direct = count <= num_landmarks
    # Equal tokens would make such a core singular; its result is not used, but its gradient would be NaN.
    core = torch.where(direct, torch.eye(num_landmarks, dtype=core.dtype, device=core.device), core)
    mu = v.sum(2, keepdim=True) / count.clamp_min(1)
    solution = fitted(inverse.candidates(core, columns - mu), pilots, landmarks_k, exact - mu)
    out = partial_attention(q, landmarks_k, mu + solution)[0]
    rank = (key_padding_mask.cumsum(-1) - 1).clamp(0, num_landmarks - 1)
    return torch.where(direct, columns.take_along_dim(rank[:, None, :, None], 2), out)


def pilot_rows(
    q: Float[Tensor, "b h n d"], num_pilots: int, key_padding_mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b h p d"]:
    """The real queries in the middle of `num_pilots` equal stretches of each example."""
    middle = 2 * torch.arange(num_pilots, device=q.device) + 1
    if key_padding_mask is None:
        return q.index_select(2, middle * q.shape[2] // max(2 * num_pilots, 1))
    seen = key_padding_mask.cumsum(-1)
    rank = middle * seen[:, -1:] // max(2 * num_pilots, 1)
    place = torch.searchsorted(seen, rank + 1).clamp(max=q.shape[2] - 1)
    return q.take_along_dim(place[:, None, :, None], 2)


def fitted(
    candidates: Float[Tensor, "k b h l dv"],
    pilots: Float[Tensor, "b h p d"],
    landmarks_k: Float[Tensor, "b h l d"],
    exact: Float[Tensor, "b h p dv"],
) -> Float[Tensor, "b h l dv"]:
    """The candidate, scaled, whose rows come nearest to the exact ones at the pilots; the first without pilots."""
    if exact.shape[2] == 0:
        return candidates[0]
    best = loss = None
    for candidate in candidates:
        found = partial_attention(pilots, landmarks_k, candidate)[0]
        size = found.square().sum((-2, -1), keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
        alpha = ((found * exact).sum((-2, -1), keepdim=True) / size).clamp(0, 1)
        scaled, misfit = alpha * candidate, (exact - alpha * found).square().sum((-2, -1), keepdim=True)
        if best is None or loss is None:
            best, loss = scaled, misfit
            continue
        better = misfit < loss
        best, loss = torch.where(better, scaled, best), torch.where(better, misfit, loss)
    assert best is not None, "an inverse has at least one candidate"
    return best


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
        inverse: how C^+ is applied: `RidgePath`, `Ridge` (default) or `NewtonSchulz` of attnlens.linalg.pseudo_inverse.
        num_pilots: p, queries that attend exactly to tell how far to trust the landmarks; 0 for the plain formula.
    """

    family = "low rank"
    budget = "num_landmarks"
    causal = False
    self_attention = True
    rows_independent = False

    def __init__(self, num_landmarks: int, inverse: AbstractInverse | None = None, num_pilots: int = 0) -> None:
        super().__init__()
        if num_landmarks < 1:
            raise ValueError(f"`num_landmarks` must be at least 1, got {num_landmarks}")
        if num_pilots < 0:
            raise ValueError(f"`num_pilots` must be at least 0, got {num_pilots}")
        self.num_landmarks, self.num_pilots = num_landmarks, num_pilots
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
        return nystrom_attention(q, k, v, self.num_landmarks, self.inverse, self.num_pilots, key_padding_mask)

    def residual(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h"]:
        """|C Z C - C| / |C| of the inverse Z in use: how far regularization or early stopping is from C^+."""
        core = core_matrix(*landmarks(q, k, self.num_landmarks, None))
        return penrose_residual(core, self.inverse(core, torch.eye(core.shape[-1]).to(core).expand_as(core)))
