"""Decayed attention: its dense meaning, its form in both directions, and the log decays it reads.

Between positions i and j a channel c of the state loses the factor of the decays in between,

    out_i = sum_j sum_c q_ic k_jc e^{-|L_ic - L_jc|} v_j,   L_i = g_1 + ... + g_i,   g <= 0,   j <= i if causal,

so that a pair is weighed alike from either side. One decay a token (g without a channel axis) is the same for all c.
The bidirectional form is one causal run forward, one backward, less the diagonal that both contain.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Scan = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bounded_decay(log_decay: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Log decays held above the logarithm of the smallest normal number, below which the past is gone either way.

    Differences of running sums lose what the size of the sums costs: in float32 one decay of e^{-10^6} would leave one
    digit to those that follow it in its chunk.
    """
    return log_decay.clamp_min(math.log(torch.finfo(log_decay.dtype).tiny))


def masked_tokens(x: Float[Tensor, "b h m *d"], key_padding_mask: Bool[Tensor, "b m"] | None) -> Tensor:
    """x with zeros at padding: a decay of one, a step of zero, no key and no value leave a state as it is."""
    if key_padding_mask is None:
        return x
    real = key_padding_mask[:, None]
    return torch.where(real if x.ndim == 3 else real[..., None], x, 0)


def decayed_dense(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    log_decay: Float[Tensor, "b h n"] | Float[Tensor, "b h n d"],
    *,
    causal: bool,
) -> Float[Tensor, "b h n dv"]:
    """The definition with its matrix materialized, channel by channel."""
    total = log_decay.cumsum(2)
    total = total[..., None].expand_as(k) if log_decay.ndim == 3 else total
    weights = torch.zeros(*q.shape[:3], q.shape[2], dtype=q.dtype, device=q.device)
    for a, b, level in zip(q.unbind(-1), k.unbind(-1), total.unbind(-1), strict=True):
        distance = (level[..., :, None] - level[..., None, :]).abs()
        weights = weights + a[..., :, None] * b[..., None, :] * torch.exp(-distance)
    return (weights.tril() if causal else weights) @ v


def in_both_directions(
    scan: Scan,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    log_decay: Float[Tensor, "b h m *d"],
) -> Float[Tensor, "b h n dv"]:
    """The bidirectional form by two runs of a causal `scan`; with fewer queries than keys they are the last tokens.

    Raises:
        ValueError: more queries than keys: the first ones would have no position.
    """
    n, m = q.shape[2], k.shape[2]
    if n > m:
        raise ValueError(f"`q` has {n} tokens and `k` {m}: decays are between positions, and `q` are the last of them")
    queries = F.pad(q, (0, 0, m - n, 0))
    # Backward, the step from i + 1 to i loses what the step from i to i + 1 does forward: g_{i+1}.
    reverse = torch.cat([torch.zeros_like(log_decay[:, :, :1]), log_decay.flip(2)[:, :, :-1]], 2)
    backward = scan(queries.flip(2), k.flip(2), v.flip(2), reverse).flip(2)
    own = (queries * k).sum(-1, keepdim=True) * v
    return (scan(queries, k, v, log_decay) + backward - own)[:, :, m - n :]
