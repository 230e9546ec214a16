"""Windowed rotary positions: rotated queries and keys as they would stand at one fixed distance from each other.

Rotary positions give the score of a pair <R_i q, R_j k> = <R_{i-j} q, k>. Far from the diagonal the distance is clipped
to one number w,

    <R_w q, k>   in place of   <R_{i-j} q, k>,

so that a key is one vector, k, wherever it stands, and keys with the same content may be counted as one. Given rotated
rows this is q' = R_{w-i} (R_i q) and k' = R_{-j} (R_j k), rotations both: norms and gradients are kept. The two scores
differ by at most sum over planes of 2 |sin((i - j - w) theta_p / 2)| |q_p| |k_p|.

Source: "A2ATS: Retrieval-Based KV Cache Reduction via Windowed Rotary Position Embedding and Query-Aware Vector
Quantization" (He et al., 2025), https://arxiv.org/abs/2502.12665.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.position.rope import rotate


def windowed_rotation(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], base: float, distance: int
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
    """q' and k' of rows that `Rope` with this `base` has rotated by their places 0 .. n - 1."""
    n, d = q.shape[2:]
    theta = base ** (-torch.arange(0, d, 2, dtype=torch.float64, device=q.device) / d)
    angle = torch.arange(n, dtype=torch.float64, device=q.device)[:, None] * theta
    of_queries = distance * theta - angle
    q = rotate(q, of_queries.cos().to(q.dtype), of_queries.sin().to(q.dtype))
    return q, rotate(k, angle.cos().to(k.dtype), -angle.sin().to(k.dtype))
