"""Causal attention with a matrix state whose rows decay each at its own rate, by chunks.

    S_i = diag(e^{g_i}) S_{i-1} + k_i v_i^T,   out_i = S_i^T q_i,   g_i <= 0 in R^d.

Within a chunk, with L_i = g_1 + ... + g_i, the weight of a pair is a sum over channels,

    W_ij = sum_c q_ic k_jc e^{L_ic - L_jc},   j <= i,

in which e^{L_i} and e^{-L_j} may not be taken apart: the second overflows. Between the halves of a block it factors
through the end r of the first half, W_ij = <q_i e^{L_i - L_r}, k_j e^{L_r - L_j}> with both exponents <= 0; so do
halves of halves, down to single tokens, whose weight <q_i, k_i> has no decay: log2(c) products for all blocks of a size
at once, and as many exponentials a channel. States as in attnlens.linalg.scan, with e^{L} at the chunk's ends.

Time O(n c (d + dv) + n d dv + n d log c), memory O(n (c + d log c) + n d dv / c) under autograd.

Source: "Gated Linear Attention Transformers with Hardware-Efficient Training" (Yang et al., 2024),
https://arxiv.org/abs/2312.06635, which cuts chunks in two levels and evaluates the pairs of the lower one singly; the
halving is that of hierarchical matrices.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.scan import chunk_length

LONGEST = 32


def decayed_scores(
    q: Float[Tensor, "*batch c d"], k: Float[Tensor, "*batch c d"], total: Float[Tensor, "*batch c d"]
) -> Float[Tensor, "*batch c c"]:
    """W of the module docstring from the running sums `total` of the log decays; c must be a power of two."""
    c, half = q.shape[-2], 1
    weights = (q * k).sum(-1)[..., None, None]
    while half < c:
        (_, a), (b, _) = (x.unflatten(-2, (-1, 2, half)).unbind(-3) for x in (q, k))
        first, second = total.unflatten(-2, (-1, 2, half)).unbind(-3)
        border = first[..., -1:, :]
        corner = (a * (second - border).exp()) @ (b * (border - first).exp()).mT
        above, below = weights[..., 0::2, :, :], weights[..., 1::2, :, :]
        weights = torch.cat([F.pad(above, (0, half)), torch.cat([corner, below], -1)], -2)
        half *= 2
    return weights.squeeze(-3)


def channel_scan(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    log_decay: Float[Tensor, "b h n d"],
    *,
    state: Float[Tensor, "b h d dv"] | None = None,
    final_state: bool = False,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "b h d dv"] | None, Float[Tensor, "b h n dv"]]:
    """The recurrence of the module docstring from `state` (None: zero) on; the state after the last token where
    `final_state` asks for it. Decays should have passed attnlens.linalg.decay.bounded_decay.

    Args:
        chunk: tokens of a chunk, a power of two; by default the next one to `chunk_length` or to a shorter input, at
            most 32: a level more costs more in exponentials than it saves in states.
    """
    n = q.shape[2]
    chunk = 1 << (min(n, chunk_length(n), LONGEST) - 1).bit_length() if chunk is None else chunk
    # Zeros write nothing and decay nothing, so the last state is that of the last token.
    queries, keys, values, rates = (
        F.pad(x, (0, 0, 0, -n % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v, log_decay)
    )
    total = rates.cumsum(-2)
    out = decayed_scores(queries, keys, total) @ values
    end = total[..., -1:, :]
    fresh = (keys * (end - total).exp()).mT @ values
    reads, kept = queries * total.exp(), end.mT.exp()
    outs = []
    for local, read, new, keep in zip(*(x.unbind(2) for x in (out, reads, fresh, kept)), strict=True):
        outs.append(local if state is None else local + read @ state)
        state = new if state is None else new + keep * state
    return state if final_state else None, torch.cat(outs, 2)[:, :, :n]
