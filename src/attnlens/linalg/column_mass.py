"""Column sums of exact attention: how much weight the queries of the last n of m tokens give each key.

    c_j = sum_h sum_i P^h_ij,   P^h_i = softmax_j(scale <q^h_i, k_j>),  j <= m - n + i,

over the query heads h of a key/value group. O(n m H d) time; queries go in blocks, so that O(256 m H) weights exist
at a time. Weights are formed in float32 or better.

Source: the scores of "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (Zhang et
al., 2023), https://arxiv.org/abs/2306.14048.
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 256


def column_mass(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], *, scale: float | None = None
) -> Float[Tensor, "b g m"]:
    """The sums, in float32 or better; they add up to n h/g in every group. `scale` defaults to 1/sqrt(d)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    n, m, heads = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    rows = q.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows, keys = rows.unflatten(1, (k.shape[1], heads)), k.to(dtype)
    total = rows.new_zeros(k.shape[:3])
    for start in range(0, n, BLOCK):
        block = rows[..., start : start + BLOCK, :]
        size = block.shape[-2]
        seen = m - n + start + size
        scores = block.flatten(2, 3) @ keys[:, :, :seen].mT
        own = scores.unflatten(2, (heads, size))[..., seen - size :]
        own.masked_fill_(torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        total[..., :seen] += torch.softmax(scores, -1).sum(2)
    return total
