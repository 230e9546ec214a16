"""Exact attention of the last n of m tokens, over keys and values that groups of query heads share.

    out_i = softmax(scale q_i K_{<= m-n+i}^T) V_{<= m-n+i},   i = 1 .. n,   query head h reads group h // (H/G).

The queries of a group are rows of one matrix against the group's keys, which are read once and never repeated; the
causal block of the new tokens among themselves is a second part, merged by log-sum-exp. O(n m H d) time, and for n = 1
the O(m G d) memory traffic of reading the cache once.

Sources: "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (Ainslie et al., 2023),
https://arxiv.org/abs/2305.13245; `merge` of linalg.partial.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.partial import merge, partial_attention


def repeat_groups(x: Float[Tensor, "b g n d"], num_heads: int) -> Float[Tensor, "b h n d"]:
    """Every group once for each of its query heads; `x` itself where there is nothing to repeat."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def suffix_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m dv"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h n dv"]:
    """Causal attention of the queries of the last n tokens over all m of them; `scale` defaults to 1/sqrt(d)."""
    num_heads, n, groups, m = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if n == 1:
        return _unfold(_one_token(_fold(q, groups), k, v, scale), num_heads)
    new_k, new_v = (repeat_groups(x[:, :, m - n :], num_heads) for x in (k, v))
    own = partial_attention(q, new_k, new_v, causal=True, scale=scale)
    if m == n:
        return own[0]
    past, lse = partial_attention(_fold(q, groups), k[:, :, : m - n], v[:, :, : m - n], scale=scale)
    return merge((_unfold(past, num_heads), _unfold(lse[..., None], num_heads)[..., 0]), own)[0]


def _one_token(
    q: Float[Tensor, "b g r d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m dv"], scale: float | None
) -> Float[Tensor, "b g r dv"]:
    """Attention of the r queries of one token over all keys, by the call with the least around its products."""
    if q.numel() * k.shape[2] == 0:
        return partial_attention(q, k, v, scale=scale)[0]
    if v.shape[-1] == k.shape[-1]:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        # The CPU kernel answers a NaN query with zeros.
        return out + 0 * q.sum(-1, keepdim=True)
    # Unequal widths have no kernel, and PyTorch would scale a copy of all keys; scores are few beside them.
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = q.float() @ k.float().mT if q.dtype.itemsize < 4 else q @ k.mT
    return torch.softmax(scores, -1).to(v.dtype) @ v


def _fold(q: Float[Tensor, "b h n d"], groups: int) -> Float[Tensor, "b g r d"]:
    """The query heads of a group one below the other, r = (h/g) n."""
    return q.reshape(q.shape[0], groups, -1, q.shape[3])


def _unfold(out: Float[Tensor, "b g r d"], num_heads: int) -> Float[Tensor, "b h n d"]:
    return out.reshape(out.shape[0], num_heads, -1, out.shape[3])
