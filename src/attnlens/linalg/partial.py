"""Partial softmax attention `(out, lse)` and its merging: the primitive under everything softmax-like.

Attention over a subset P_i of the keys,

    out_i = sum_{j in P_i} exp(s_ij - lse_i) v_j,    lse_i = log sum_{j in P_i} exp(s_ij),    s_ij = scale <q_i, k_j>,

is mergeable: for disjoint subsets, lse = logsumexp_r(lse^r) and out = sum_r exp(lse^r - lse) out^r. On a CPU it
is PyTorch's flash kernel, on a GPU the memory-efficient kernel, elsewhere the chunked form of `online_softmax`.
Both outputs are differentiable. The kernels' backward passes know no gradient of lse, but they read `out` only through
delta_i = <dout_i, out_i>, and the gradient of s is P * (dP - delta + dlse): handing them an `out` whose delta is
smaller by dlse adds the missing term.

Sources: "Online normalizer calculation for softmax" (Milakov, Gimelshein, 2018); "FlashAttention" (Dao, Fu, Ermon,
Rudra, Ré, 2022).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attnlens.linalg.online_softmax import online_softmax, online_softmax_backward

aten = torch.ops.aten


def partial_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Softmax attention and its log-sum-exp, both differentiable in q, k and v.

    `causal` hides keys j > i (top left aligned). `bias` is added to the scores, broadcasts to (b, h, n, m), may hold
    -inf, and receives no gradient. `scale` defaults to 1/sqrt(d). A row that sees no key has out = 0, lse = -inf. A row
    of q that holds NaN gives NaN in that row, which the CPU kernel alone would turn into zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if min(q.shape[0], q.shape[1], q.shape[2], k.shape[2]) == 0:
        # The kernels divide by these lengths; on a CPU an empty one ends the process.
        return q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], -torch.inf)
    mask, visible = _mask(q, causal, key_padding_mask, bias)
    step = _alignment(q)
    width = -(-max(q.shape[-1], v.shape[-1]) // step) * step
    out, lse = _Partial.apply(_widen(q, width), _widen(k, width), _widen(v, width), mask, visible, causal, scale)
    return out[..., : v.shape[-1]], lse


def merge(
    *parts: tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]],
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """The attention over the union of disjoint key sets from that over each; a key found in two parts counts twice.

    Rows that are empty (lse = -inf) in some or in all parts are weighed by zero, their gradient included.
    """
    lses = torch.stack([part[1] for part in parts])
    empty = lses == -torch.inf
    # A finite floor keeps the softmax of an all-empty row, and its gradient, free of NaN.
    floor = torch.finfo(lses.dtype).min / 4
    lses = lses.masked_fill(empty, floor)
    weights = torch.softmax(lses, 0).masked_fill(empty, 0)[..., None].to(parts[0][0].dtype)
    lse = torch.logsumexp(lses, 0).masked_fill(empty.all(0), -torch.inf)
    # One pass over each part: stacked, the parts would be copied first.
    out = weights[0] * parts[0][0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        out = torch.addcmul(out, weight, part[0])
    return out, lse


def _alignment(x: Tensor) -> int:
    """Elements in the 16 bytes that rows must be a multiple of for the GPU's kernels; 1 elsewhere."""
    return 16 // x.element_size() if x.device.type == "cuda" else 1


def _widen(x: Tensor, width: int) -> Tensor:
    """Zero columns up to `width`: the kernels want values as wide as queries, last-axis contiguity and, on a GPU, rows
    that start at multiples of 16 bytes."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    step = _alignment(x)
    aligned = step == 1 or all(place % step == 0 for place in (*x.stride()[:-1], x.storage_offset()))
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def _mask(
    q: Tensor, causal: bool, key_padding_mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The additive mask that the kernels take, in q's dtype, and which rows see any key (None: all do)."""
    if key_padding_mask is None and bias is None:
        return None, None
    mask = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias.detach().to(q.dtype)
    if key_padding_mask is not None:
        mask = mask.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)
    mask = mask.expand(*(1,) * (4 - mask.ndim), *mask.shape)
    n, m = q.shape[2], mask.shape[3]
    if not causal:
        # A maximum takes a CPU a sixth of the time of a comparison and `any`; a NaN bias is to show in the output.
        return mask, (mask.amax(-1) != -torch.inf).expand(*q.shape[:3])
    seen = mask > -torch.inf
    if mask.shape[2] == 1:
        visible = F.pad(seen[:, :, 0].cumsum(-1) > 0, (0, max(n - m, 0)), value=False)[..., :n]
        visible = visible | (seen.any(-1) & (torch.arange(n, device=q.device) >= m))
    else:
        visible = seen.tril().any(-1)
    return mask, visible.expand(*q.shape[:3])


class _Partial(torch.autograd.Function):
    """The kernel of the device at hand, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        visible: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.causal, ctx.scale = causal, scale
        ctx.extra = ()
        if q.device.type == "cpu":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=mask, scale=scale
            )
            kept = lse
        elif q.device.type == "cuda" and q.dtype != torch.float64:
            mask = None if mask is None else _aligned(mask, q, k)
            out, kept, *ctx.extra = aten._scaled_dot_product_efficient_attention(
                q, k, v, mask, True, 0.0, causal, scale=scale
            )
            lse = kept[..., : q.shape[2]]
        else:
            out, lse = online_softmax(q, k, v, mask, causal, scale)
            kept = lse
        # In place: out is the largest tensor here, and a fresh one costs more than the arithmetic on it.
        poison = q.sum(-1, keepdim=True).mul_(0)
        out.add_(poison)
        lse = lse + poison[..., 0]
        if visible is not None:
            out.masked_fill_(~visible[..., None], 0)
            lse = lse.masked_fill(~visible, -torch.inf)
        ctx.save_for_backward(q, k, v, out, kept, mask)
        return out, lse.contiguous()

    @staticmethod
    @once_differentiable  # its wrapper hides the names of the arguments from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grad_outputs
        q, k, v, out, lse, mask = ctx.saved_tensors
        grad_out, out = _with_lse_gradient(grad_out, out, grad_lse.to(out.dtype)[..., None])
        if q.device.type == "cpu":
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, q, k, v, out, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
            )
        elif q.device.type == "cuda" and q.dtype != torch.float64:
            needed = [True, True, True, False]
            grads = aten._scaled_dot_product_efficient_attention_backward(
                grad_out, q, k, v, mask, out, lse, *ctx.extra, 0.0, needed, ctx.causal, scale=ctx.scale
            )
        else:
            grads = online_softmax_backward(grad_out, q, k, v, out, lse, mask, ctx.causal, ctx.scale)
        return grads[0], grads[1], grads[2], None, None, None, None


def _with_lse_gradient(grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(dout, out') such that <dout, out'> = <dout, out> - dlse."""
    norm = grad_out.square().sum(-1, keepdim=True)
    silent = (norm == 0) & (grad_lse != 0)
    # Where dout = 0 nothing can carry dlse: a dout of size eps^2 does, below the round-off of every gradient.
    tiny = torch.finfo(out.dtype).eps ** 2 * grad_lse.abs()
    grad_out = torch.cat([torch.where(silent, tiny, grad_out[..., :1]), grad_out[..., 1:]], -1)
    norm = torch.where(silent, tiny.square(), norm)
    shift = torch.where(norm > 0, grad_lse / torch.where(norm > 0, norm, 1), 0)
    return grad_out, out - shift * grad_out


def _aligned(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask the GPU kernel accepts: finite (an all -inf row would give NaN), full size, rows 16-element aligned."""
    m = k.shape[2]
    mask = mask.clamp_min(torch.finfo(q.dtype).min / 2).expand(*q.shape[:3], m)
    return F.pad(mask, (0, -m % 16))[..., :m]
