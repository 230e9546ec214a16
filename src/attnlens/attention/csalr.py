"""CSALR: attention from a few landmarks, with a core matrix that a shift makes invertible.

With the landmarks Q~, K~ = means over the same l consecutive segments of each example's real tokens, s = 1/sqrt(d) and

    F = softmax(s Q K~^T),   C = softmax(s Q~ K~^T),   B = softmax(s Q~ K^T),

    P ~ D^{-1} (F + c E) (C + c I)^{-1} B,   E_ij = 1 where segment j is token i alone,   D = diag(1 + c E 1) / (1 + c).

Since F 1 = C 1 = B 1 = 1, (C + c I)^{-1} B has row sums 1/(1 + c), and D makes all row sums of P~ one. Weights may be
negative. C is positive with row sums one, so that no eigenvalue is -1 (Perron) and C + I is invertible, but its
condition number has no bound: it is infinite where C underflows to a permutation. For a shift c > 1, however,
|C|_inf = 1 and the Neumann series of (I + C / c)^{-1} give, for all inputs,

    |(C + c I)^{-1}|_inf <= 1 / (c - 1),   cond_inf(C + c I) <= (c + 1) / (c - 1).

Time O(n l (d + dv) + l^3), memory O(n d + l^2). With l >= n every token is its own landmark, F = C = B = P, E = I and
(P + c I)(P + c I)^{-1} P = P: softmax attention, which is then computed directly.

Source: "Compressed Self-Attention for Deep Metric Learning with Low-Rank Approximation" (Chen, Wang, Wang, Jian, Li,
2020), https://doi.org/10.24963/ijcai.2020/285. Departures: the paper has c = 1 and row sums of 1/2, 1 where a token is
alone; here rows are renormalized and c is an argument. c = 0 would be Nyström's formula, c to infinity is F B.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.landmarks import segment, segment_means
from attnlens.linalg.partial import partial_attention


def csalr_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    num_landmarks: int,
    shift: float,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The formula above, and softmax attention for each example that has no more real tokens than landmarks."""
    n = q.shape[2]
    if n <= num_landmarks:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)[0]
    segments = segment(n, num_landmarks, key_padding_mask, q.device)
    landmarks_q, landmarks_k = segment_means(q, segments), segment_means(k, segments)
    columns, _ = partial_attention(landmarks_q, k, v, key_padding_mask=key_padding_mask)
    core = shifted_core(landmarks_q, landmarks_k, shift)
    real = torch.ones(1, n, dtype=torch.bool, device=q.device) if key_padding_mask is None else key_padding_mask
    count = real.sum(-1)[:, None, None, None]
    mu = v.sum(2, keepdim=True) / count.clamp_min(1)
    # Rows sum to one in exact arithmetic; acting on V - mu makes them do so in floating point as well.
    solved = torch.linalg.solve_ex(core, columns - mu).result
    out, _ = partial_attention(q, landmarks_k, solved)
    if key_padding_mask is None and n >= 2 * num_landmarks:
        return mu + (1 + shift) * out
    place, alone = singles(real, num_landmarks)
    own = solved.take_along_dim(place[:, None, :, None], 2)
    alone = alone[:, None, :, None].to(out)
    out = mu + (1 + shift) / (1 + shift * alone) * (out + shift * alone * own)
    return torch.where(count <= num_landmarks, columns.take_along_dim(place[:, None, :, None], 2), out)


def singles(real: Bool[Tensor, "b n"], num_landmarks: int) -> tuple[Tensor, Bool[Tensor, "b n"]]:
    """For every token the number of its segment, and whether it is alone there (padding never is)."""
    count = real.sum(-1, keepdim=True).clamp_min(1)
    filled = count.clamp_max(num_landmarks)
    rank = (real.cumsum(-1) - 1).clamp_min(0)
    place = ((rank + 1) * filled - 1) // count
    size = (place + 1) * count // filled - place * count // filled
    return place, real & (size == 1)


def shifted_core(
    landmarks_q: Float[Tensor, "b h l d"], landmarks_k: Float[Tensor, "b h l d"], shift: float
) -> Float[Tensor, "b h l l"]:
    """C + c I."""
    core = torch.softmax(landmarks_q @ landmarks_k.mT * landmarks_q.shape[-1] ** -0.5, -1)
    return core + shift * torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)


class Csalr(AbstractAttention):
    """Landmark attention with a shifted core.

    Args:
        num_landmarks: l, at least 1.
        shift: c, at least 1. The paper has 1; above it the condition number is at most (c + 1) / (c - 1).
    """

    family = "low rank"
    budget = "num_landmarks"
    causal = False
    self_attention = True
    rows_independent = False

    def __init__(self, num_landmarks: int, shift: float = 1.0) -> None:
        super().__init__()
        if num_landmarks < 1:
            raise ValueError(f"`num_landmarks` must be at least 1, got {num_landmarks}")
        if not 1 <= shift < float("inf"):
            raise ValueError(f"`shift` must be finite and at least 1, got {shift}: below it the core may be singular")
        self.num_landmarks = num_landmarks
        self.shift = shift

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
        return csalr_attention(q, k, v, self.num_landmarks, self.shift, key_padding_mask)

    def condition_number(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h"]:
        """cond_inf(C + c I), infinite where it is singular: how much the landmarks' solve may amplify."""
        segments = segment(q.shape[2], self.num_landmarks, None, q.device)
        core = shifted_core(segment_means(q, segments), segment_means(k, segments), self.shift)
        return torch.linalg.cond(core, float("inf"))
