"""Softmax attention in which every query has its own few keys: choosing them by score, and attending to them.

- `top_keys` finds the keys with the largest scores of every query, streamed over chunks of queries: no n x m matrix.
- `selected_attention` is softmax over the chosen keys of each row, again in chunks, and computed anew in the backward
  pass, so that the gathered keys and values of a chunk are all that is ever held.
- `dropped_mass` and `value_diameter` bound the error of leaving keys out, from the dense matrix: for analysis.

For a set S_i of keys with softmax mass 1 - delta_i, out_i = (1 - delta_i) a + delta_i c for a mean a of the values in
S_i and a mean c of the others. Softmax over S_i alone returns a and is off by delta_i |c - a| <= delta_i diam(V).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlens.linalg.blocks import take_rows
from attnlens.linalg.dense import softmax_weights
from attnlens.linalg.partial import partial_attention

ROWS = 128


def top_indices(scores: Float[Tensor, "*k m"], size: int) -> Int[Tensor, "*k size"]:
    """Positions of the `size` <= m largest entries of every row; of equal ones the first are taken.

    `torch.topk` breaks ties by an order that changes with m: a query of zeros, say, would choose other keys in a prefix
    or in an unpadded run. Scores that differ by round-off alone are not equal.
    """
    m = scores.shape[-1]
    if size == m:
        return torch.arange(m, device=scores.device).expand(scores.shape)
    values, index = scores.topk(size, dim=-1)
    least = values[..., -1:]
    above = values > least
    ties = (scores == least).cumsum(-1, dtype=torch.int32)
    slot = torch.arange(1, size + 1, dtype=torch.int32, device=scores.device)
    number = slot - above.sum(-1, keepdim=True, dtype=torch.int32)
    return torch.where(above, index, torch.searchsorted(ties, number).clamp(max=m - 1))


def top_keys(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    size: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> tuple[Int[Tensor, "b h n r"], Bool[Tensor, "b h n r"]]:
    """The min(size, m) visible keys with the largest <q_i, k_j> of every row, and which slots hold one. No gradient."""
    q, k, m = q.detach(), k.detach(), k.shape[2]
    slots = min(size, m)
    chosen, filled = [], []
    for start in range(0, q.shape[2], ROWS):
        rows = q[:, :, start : start + ROWS]
        seen = min(start + rows.shape[2], m) if causal else m
        scores = rows @ k[:, :, :seen].mT
        if causal:
            position = torch.arange(start, start + rows.shape[2], device=q.device)[:, None]
            scores = scores.masked_fill(torch.arange(seen, device=q.device) > position, -torch.inf)
        if key_padding_mask is not None:
            scores = scores.masked_fill(~key_padding_mask[:, None, None, :seen], -torch.inf)
        index = top_indices(scores, min(slots, seen))
        # The scores of a NaN query have no order; its slots stay filled, so that its output is NaN.
        visible = (scores.gather(-1, index) > -torch.inf) | rows.isnan().any(-1, keepdim=True)
        # A key that fills up an empty slot is one that is chosen anyway.
        missing = (*index.shape[:-1], slots - index.shape[-1])
        chosen.append(torch.cat([index, index.new_zeros(missing)], -1))
        filled.append(torch.cat([visible, visible.new_zeros(missing)], -1))
    return torch.cat(chosen, 2), torch.cat(filled, 2)


def selected_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    index: Int[Tensor, "b h n r"],
    visible: Bool[Tensor, "b h n r"],
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """`(out, lse)` of every row over its keys `index`, each at most once where `visible`.

    Up to `ROWS` keys the choice is a mask for the fused kernel, beyond that keys and values are gathered.
    """
    if k.shape[2] > ROWS:
        return _Gathered.apply(q, k, v, index, visible, q.shape[-1] ** -0.5)
    count = torch.zeros(*index.shape[:3], k.shape[2], dtype=q.dtype, device=q.device)
    hidden = count.scatter_add_(-1, index, visible.to(q.dtype)) == 0
    return partial_attention(q, k, v, bias=torch.zeros_like(count).masked_fill(hidden, -torch.inf))


def _gathered_weights(
    q: Float[Tensor, "b h c d"],
    k: Float[Tensor, "b h m d"],
    index: Int[Tensor, "b h c r"],
    visible: Bool[Tensor, "b h c r"],
    scale: float,
) -> tuple[Float[Tensor, "b h c r"], Float[Tensor, "b h c"], Float[Tensor, "b h c r d"]]:
    """Softmax weights of a chunk, their log-sum-exp, and the gathered keys."""
    keys = take_rows(k, index)
    scores = (keys @ q[..., None]).squeeze(-1) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]), lse, keys


class _Gathered(torch.autograd.Function):
    """Chunks of `ROWS` queries over their gathered keys and values; the backward pass gathers them once more."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, visible: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for start in range(0, q.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            weights, lse, _ = _gathered_weights(q[:, :, rows], k, index[:, :, rows], visible[:, :, rows], scale)
            outs.append((weights[..., None, :] @ take_rows(v, index[:, :, rows])).squeeze(-2))
            lses.append(lse)
        out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, index, visible, out)
        return out, lse

    @staticmethod
    @once_differentiable  # its wrapper hides the names of the arguments from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, index, visible, out = ctx.saved_tensors
        grad_out, grad_lse = grad_outputs
        grads_q, grad_k, grad_v = [], k.new_zeros(k.shape), v.new_zeros(v.shape)
        shift = (grad_out * out).sum(-1, keepdim=True) - grad_lse[..., None]
        for start in range(0, q.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            slots, of_out, queries = index[:, :, rows], grad_out[:, :, rows], q[:, :, rows]
            weights, _, keys = _gathered_weights(queries, k, slots, visible[:, :, rows], ctx.scale)
            of_weights = (take_rows(v, slots) @ of_out[..., None]).squeeze(-1)
            of_scores = weights * (of_weights - shift[:, :, rows]) * ctx.scale
            grads_q.append((of_scores[..., None, :] @ keys).squeeze(-2))
            grad_k = _add_rows(grad_k, slots, of_scores[..., None] * queries[..., None, :])
            grad_v = _add_rows(grad_v, slots, weights[..., None] * of_out[..., None, :])
        return torch.cat(grads_q, 2), grad_k, grad_v, None, None, None


def _add_rows(
    total: Float[Tensor, "b h m d"], index: Int[Tensor, "b h c r"], rows: Float[Tensor, "b h c r d"]
) -> Float[Tensor, "b h m d"]:
    """`total`, in place, with `rows` added where `index` says."""
    b, h, m, d = total.shape
    start = (torch.arange(b * h, device=total.device) * m).view(b, h, 1, 1)
    total.view(-1, d).index_add_(0, (index + start).flatten(), rows.reshape(-1, d))
    return total


def dropped_mass(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    index: Int[Tensor, "b h n r"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n"]:
    """delta_i: the softmax mass outside the keys `index`, from the dense matrix in float64."""
    weights = softmax_weights(q.double(), k.double(), causal=causal, key_padding_mask=key_padding_mask)
    return weights.scatter(-1, index, 0).sum(-1)


def value_diameter(
    v: Float[Tensor, "b h m dv"], *, causal: bool, key_padding_mask: Bool[Tensor, "b m"] | None
) -> Float[Tensor, "b h #m"]:
    """The largest distance between two real values, or between two of those up to each position."""
    # A difference of squared norms, by a matrix product, loses small distances of long values.
    apart = torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist")
    if key_padding_mask is not None:
        pairs = key_padding_mask[:, None, :, None] & key_padding_mask[:, None, None, :]
        apart = apart.masked_fill(~pairs, 0)
    if causal:
        return apart.tril().amax(-1).cummax(-1).values
    return apart.amax((-2, -1))[..., None]
