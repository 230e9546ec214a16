"""Attention with a polynomial kernel and a one in the denominator, streamed over chunks of queries.

    out_i = sum_j w_ij |c + <x_i, y_j>|^p v_j / (1 + sum_j w_ij |c + <x_i, y_j>|^p),

w_ij how often key j counts for query i: 0 where it is hidden. The one is a key of kernel value one and value zero, a
sink: a row that sees nothing, or only orthogonal keys, is zero and no row divides by zero. Numerator and denominator
are divided by mu_i^p, mu_i = max(1, max_j |c + <x_i, y_j>|), so that no power overflows; terms below
(tiny)^{1/p} mu_i underflow to the zero that they are in the sum.

`dense` is the definition with its matrix. `rows` holds one chunk of rows and computes it anew in the backward pass:
memory O(ROWS m) for a sequence of any length.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS = 128


def scaled(x: Float[Tensor, "b h n d"], normalize: bool) -> Float[Tensor, "b h n d"]:
    """d^{-1/4} x, so that inner products are the logits <q, k>/sqrt(d); `normalize` applies layer norm (without
    parameters) to every vector first, after which |x| = d^{1/4}."""
    d = x.shape[-1]
    return (F.layer_norm(x, (d,)) if normalize else x) * d**-0.25


def with_sink(numerator: Float[Tensor, "b h n dv"], mass: Float[Tensor, "b h n"]) -> Float[Tensor, "b h n dv"]:
    """numerator / (1 + mass), the mass not negative."""
    return numerator / (1 + mass)[..., None]


def visibility(
    mask: Bool[Tensor, "b m"] | None, first: int, rows: int, keys: int, *, causal: bool, like: Tensor
) -> Float[Tensor, "b 1 r k"] | None:
    """w of the module docstring for rows first..first + rows - 1 over the first `keys` keys; None where all are 1."""
    if mask is None and not causal:
        return None
    shape = (like.shape[0], 1, rows, keys)
    visible = torch.ones(shape, dtype=torch.bool, device=like.device)
    if mask is not None:
        visible = visible & mask[:, None, None, :keys]
    if causal:
        visible = visible.tril(first)
    return visible.to(like.dtype)


def weights(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    degree: int | float,
    constant: int | float,
    multiplicity: Float[Tensor, "b #h #n m"] | None,
) -> tuple[Float[Tensor, "b h n m"], Float[Tensor, "b h n 1"], Float[Tensor, "b h n m"], Float[Tensor, "b h n 1"]]:
    """Normalized weights; the denominator over mu^p; t = (c + <x, y>)/mu; mu."""
    base = x @ y.mT + constant
    if multiplicity is not None:
        # Not the product: a hidden key may not even set the scale of the row.
        base = torch.where(multiplicity > 0, base, 0)
    scale = base.abs().amax(-1, keepdim=True).clamp_min(1)
    ratio = base / scale
    power = ratio.abs().pow(degree)
    power = power if multiplicity is None else power * multiplicity
    total = scale.pow(-degree) + power.sum(-1, keepdim=True)
    return power / total, total, ratio, scale


class _Rows(torch.autograd.Function):
    """A chunk of rows; with a = w |c + s|^p, d out_i / d s_ij = a'_ij (v_j - out_i) / (1 + sum a)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        v: Tensor,
        multiplicity: Tensor | None,
        degree: int | float,
        constant: int | float,
    ) -> Tensor:
        out = weights(x, y, degree, constant, multiplicity)[0] @ v
        ctx.degree, ctx.constant = degree, constant
        ctx.save_for_backward(x, y, v, multiplicity, out)
        return out

    @staticmethod
    @once_differentiable  # its wrapper hides the names of the arguments from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, y, v, multiplicity, out = ctx.saved_tensors
        (grad,) = grad_outputs
        p = ctx.degree
        share, total, ratio, scale = weights(x, y, p, ctx.constant, multiplicity)
        slope = p * ratio.abs().pow(max(p - 1, 0)) * ratio.sign() / (total * scale)
        slope = slope if multiplicity is None else slope * multiplicity
        of_base = slope * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
        return of_base @ y, of_base.mT @ x, share.mT @ grad, None, None, None


def rows(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    degree: int | float,
    constant: int | float,
    multiplicity: Float[Tensor, "b #h #n m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """All rows at once, from their n x m weights, which the backward pass computes anew."""
    return _Rows.apply(x, y, v, multiplicity, degree, constant)


def streamed(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    degree: int | float,
    constant: int | float,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Every query over its visible keys, `ROWS` queries at a time; a causal chunk reads no key behind its last one."""
    outs, start = [], 0
    for part in x.split(ROWS, 2):
        seen = start + part.shape[2] if causal else y.shape[2]
        seen_by = visibility(key_padding_mask, start, part.shape[2], seen, causal=causal, like=x)
        outs.append(rows(part, y[:, :, :seen], v[:, :, :seen], degree, constant, seen_by))
        start += part.shape[2]
    return torch.cat(outs, 2)


def kernel_values(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    degree: int | float,
    constant: int | float = 0,
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n m"]:
    """|c + <x, y>|^p, zero where hidden; materialized."""
    power = (x @ y.mT + constant).abs().pow(degree)
    if key_padding_mask is not None:
        power = torch.where(key_padding_mask[:, None, None], power, 0)
    return power.tril() if causal else power


def dense(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    degree: int | float,
    constant: int | float = 0,
    normalize: bool = False,
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """The definition, in float64 when given float64: the reference of all that approximate it. Padding is not read."""
    if key_padding_mask is not None:
        real = key_padding_mask[:, None, :, None]
        k, v = torch.where(real, k, 0), torch.where(real, v, 0)
    x, y = scaled(q, normalize), scaled(k, normalize)
    power = kernel_values(x, y, degree, constant, causal=causal, key_padding_mask=key_padding_mask)
    return power @ v / (1 + power.sum(-1, keepdim=True))
