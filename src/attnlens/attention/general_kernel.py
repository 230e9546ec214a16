"""Attention with a general kernel: any function of the logit in place of the exponential.

    out_i = sum_j a_ij v_j / Z_i,   a_ij = f(s_ij),   Z_i = sum_j a_ij,   s_ij = <q_i, k_j>/sqrt(d),

over the visible keys: Y = Z^{-1} A V. The mask comes after the kernel, which is the same as s_ij = -inf before it only
where f(-inf) = 0 (exp, relu, squared_relu, elu_plus_one, softplus; not polynomial and identity). f is one of

    exp            e^s: softmax attention          softplus     log(1 + e^s)
    relu           max(s, 0)                       polynomial   (1 + s)^2
    squared_relu   max(s, 0)^2                     identity     s
    elu_plus_one   s + 1 for s > 0, else e^s

Z vanishes where a row sees nothing, or where relu and squared_relu find every logit negative: the row is then zero, and
so is its gradient. No epsilon is added: rows are invariant to the scale of f. Under `identity` Z may also cancel at
nonzero weights; rows then grow like 1/Z, and only Z = 0 exactly gives zero. Time O(n m (d + dv)); memory O(n dv) and
n x BLOCK logits in both passes. Its target is its own definition.

Source: attention with a general kernel kappa(v, w) = f(<v, w>/sqrt(d)) in "Attention Mechanisms Through the Lens of
Numerical Methods", 2026, https://arxiv.org/abs/2604.01757, and its companion https://arxiv.org/abs/2604.00965; relu:
"Replacing softmax with ReLU in Vision Transformers" (Wortsman et al., 2023), which divides by the length in place of Z.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.partial import partial_attention

BLOCK = 128


class Kernel(NamedTuple):
    """f and f'."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


KERNELS = {
    "exp": Kernel(torch.exp, torch.exp),
    "relu": Kernel(torch.relu, lambda s: (s > 0).to(s.dtype)),
    "squared_relu": Kernel(lambda s: torch.relu(s).square(), lambda s: 2 * torch.relu(s)),
    "elu_plus_one": Kernel(lambda s: torch.relu(s) + s.clamp(max=0).exp(), lambda s: s.clamp(max=0).exp()),
    "softplus": Kernel(lambda s: torch.logaddexp(s, torch.zeros_like(s)), torch.sigmoid),
    "polynomial": Kernel(lambda s: (1 + s).square(), lambda s: 2 * (1 + s)),
    "identity": Kernel(lambda s: s, torch.ones_like),
}


def normalized(numerator: Float[Tensor, "b h n dv"], z: Float[Tensor, "b h n 1"]) -> Float[Tensor, "b h n dv"]:
    """numerator / Z, zero where Z is."""
    return torch.where(z == 0, 0, numerator / torch.where(z == 0, 1, z))


def visible(
    mask: Bool[Tensor, "b m"] | None, rows: int, start: int, stop: int, causal: bool, like: Tensor
) -> Bool[Tensor, "#b 1 r k"] | None:
    """Which of the keys start..stop - 1 the last `rows` queries see; the first of them is number `start` if causal."""
    seen = None if mask is None else mask[:, None, None, start:stop].expand(-1, 1, rows, -1)
    if not causal:
        return seen
    past = torch.ones(1, 1, rows, stop - start, dtype=torch.bool, device=like.device).tril()
    return past if seen is None else past & seen


def dense(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    kernel: Kernel,
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """The definition with its matrix; padding is not read."""
    if key_padding_mask is not None:
        real = key_padding_mask[:, None, :, None]
        k, v = torch.where(real, k, 0), torch.where(real, v, 0)
    a = kernel.value(q @ k.mT * q.shape[-1] ** -0.5)
    seen = visible(key_padding_mask, q.shape[2], 0, k.shape[2], causal, q)
    a = a if seen is None else torch.where(seen, a, 0)
    return normalized(a @ v, a.sum(-1, keepdim=True))


class _Streamed(torch.autograd.Function):
    """Key block by key block; d out_i / d s_ij = f'(s_ij) (v_j - out_i) / Z_i."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, v: Tensor, mask: Tensor | None, kernel: Kernel, causal: bool
    ) -> tuple[Tensor, Tensor]:
        numerator, z = x.new_zeros(*x.shape[:3], v.shape[-1]), x.new_zeros(*x.shape[:3], 1)
        for start in range(0, y.shape[2], BLOCK):
            stop, first = min(start + BLOCK, y.shape[2]), start if causal else 0
            a = kernel.value(x[:, :, first:] @ y[:, :, start:stop].mT)
            seen = visible(mask, a.shape[2], start, stop, causal, x)
            a = a if seen is None else torch.where(seen, a, 0)
            numerator[:, :, first:] += a @ v[:, :, start:stop]
            z[:, :, first:] += a.sum(-1, keepdim=True)
        out = normalized(numerator, z)
        ctx.kernel, ctx.causal = kernel, causal
        ctx.save_for_backward(x, y, v, mask, out, z)
        ctx.mark_non_differentiable(z)
        return out, z

    @staticmethod
    @once_differentiable  # its wrapper hides the names of the arguments from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, y, v, mask, out, z = ctx.saved_tensors
        grad = normalized(grad_outputs[0], z)
        own = (grad * out).sum(-1, keepdim=True)
        of_x, of_y, of_v = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(v)
        for start in range(0, y.shape[2], BLOCK):
            stop, first = min(start + BLOCK, y.shape[2]), start if ctx.causal else 0
            s, g = x[:, :, first:] @ y[:, :, start:stop].mT, grad[:, :, first:]
            a, slope = ctx.kernel.value(s), ctx.kernel.slope(s) * (g @ v[:, :, start:stop].mT - own[:, :, first:])
            seen = visible(mask, s.shape[2], start, stop, ctx.causal, x)
            if seen is not None:
                a, slope = torch.where(seen, a, 0), torch.where(seen, slope, 0)
            of_x[:, :, first:] += slope @ y[:, :, start:stop]
            of_y[:, :, start:stop] = slope.mT @ x[:, :, first:]
            of_v[:, :, start:stop] = a.mT @ g
        return of_x, of_y, of_v, None, None, None


class GeneralKernel(AbstractAttention):
    """Exact attention with the kernel f.

    Args:
        f: a name of the table above.

    Raises:
        ValueError: an unknown `f`.
    """

    family = "kernel"
    target = "itself"
    one_query = True

    def __init__(self, f: str) -> None:
        super().__init__()
        if f not in KERNELS:
            raise ValueError(f"`f` is {f!r}: choose one of {list(KERNELS)}; other degrees are attention=polynomial")
        self.f = f

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """It is its own definition."""
        return {}

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """The definition with its matrix, in float64."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return dense(q.double(), k.double(), v.double(), KERNELS[self.f], **masks)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        if self.f == "exp":
            # Alone of the table it overflows; the fused kernel subtracts the largest logit of a row.
            return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
        x = q * q.shape[-1] ** -0.5
        return _Streamed.apply(x, k, v, key_padding_mask, KERNELS[self.f], causal)[0]
