"""Softmax attention with its log-sum-exp in chunks of keys, in plain PyTorch: the portable form of the primitive.

For each chunk the running maximum m, normalizer l and output o are updated by

    m' = max(m, rowmax S),   l' = e^{m - m'} l + rowsum e^{S - m'},   o' = e^{m - m'} o + e^{S - m'} V,

so that memory is O(n (d + chunk)) instead of O(n m); out = o / l and lse = m + log l.

Source: "Online normalizer calculation for softmax" (Milakov, Gimelshein, 2018).
"""

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 512


def online_softmax(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """`out` and `lse` of q over all keys; `mask` is additive and broadcasts to (b, h, n, m)."""
    top = q.new_full(q.shape[:3], -torch.inf)
    normalizer, out = torch.zeros_like(top), q.new_zeros(*q.shape[:3], v.shape[-1])
    for start in range(0, k.shape[2], chunk):
        scores = _scores(q, k, mask, causal, scale, start, chunk)
        new_top = torch.maximum(top, scores.amax(-1))
        # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
        anchor = torch.where(new_top == -torch.inf, 0, new_top)
        decay, weights = torch.exp(top - anchor), torch.exp(scores - anchor[..., None])
        normalizer = decay * normalizer + weights.sum(-1)
        out = decay[..., None] * out + weights @ v[:, :, start : start + chunk]
        top = new_top
    safe = torch.where(normalizer == 0, 1, normalizer)
    return out / safe[..., None], torch.where(normalizer == 0, 0, top + torch.log(safe))


def online_softmax_backward(
    grad_out: Float[Tensor, "b h n dv"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    out: Float[Tensor, "b h n dv"],
    lse: Float[Tensor, "b h n"],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"], Float[Tensor, "b h m dv"]]:
    """Gradients in q, k and v, from scores computed again chunk by chunk."""
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_q, grads_k, grads_v = torch.zeros_like(q), [], []
    for start in range(0, k.shape[2], chunk):
        part = slice(start, start + chunk)
        weights = torch.exp(_scores(q, k, mask, causal, scale, start, chunk) - lse[..., None])
        grad_scores = weights * (grad_out @ v[:, :, part].mT - delta) * scale
        grad_q = grad_q + grad_scores @ k[:, :, part]
        grads_k.append(grad_scores.mT @ q)
        grads_v.append(weights.mT @ grad_out)
    return grad_q, torch.cat(grads_k, 2), torch.cat(grads_v, 2)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, start: int, chunk: int) -> Tensor:
    keys = k[:, :, start : start + chunk]
    scores = q @ keys.mT * scale
    if mask is not None:
        scores = scores + (mask if mask.shape[-1] == 1 else mask[..., start : start + chunk])
    if causal:
        position = torch.arange(start, start + keys.shape[2], device=q.device)
        future = position[None, :] > torch.arange(q.shape[2], device=q.device)[:, None]
        scores = scores.masked_fill(future, -torch.inf)
    return scores
