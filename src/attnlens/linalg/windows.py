"""Overlapping windows of a sequence, as a view; their gradients are added where they overlap."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def windows(x: Float[Tensor, "b h n d"], width: int, step: int) -> Float[Tensor, "b h t w d"]:
    """Windows of `width` rows that start `step` apart, for as long as they fit; nothing is copied.

    The gradient of PyTorch's `unfold` visits it element by element; here it is ceil(width / step) sums of whole slices.
    """
    return _Windows.apply(x, width, step)


class _Windows(torch.autograd.Function):
    """A strided view forward, sums of slices backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, step: int) -> Tensor:
        ctx.length, ctx.step = x.shape[2], step
        return x.unfold(2, width, step).mT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        grad, step = grad_outputs[0], ctx.step
        t, width = grad.shape[2:4]
        pieces = -(-width // step)
        # Padding by nothing would copy the largest tensor here.
        grad = grad if pieces * step == width else F.pad(grad, (0, 0, 0, pieces * step - width))
        grad = grad.unflatten(3, (pieces, step))
        total = grad.new_zeros(*grad.shape[:2], t + pieces - 1, step, grad.shape[-1])
        for piece in range(pieces):
            total[:, :, piece : piece + t] += grad[:, :, :, piece]
        total = total.flatten(2, 3)[:, :, : ctx.length]
        missing = ctx.length - total.shape[2]
        return total if missing == 0 else F.pad(total, (0, 0, 0, missing)), None, None
