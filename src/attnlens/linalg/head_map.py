"""An affine map of each head's tokens, learned: what gates, step sizes and feature maps are read with."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class HeadMap(nn.Module):
    """x -> W_h x + b_h for head h.

    Args:
        weight: initial W_h, transposed: (heads, head_dim, outputs).
        bias: initial b_h: (heads, 1, outputs).
    """

    def __init__(self, weight: Float[Tensor, "h d e"], bias: Float[Tensor, "h 1 e"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n e"]:
        """In the precision of x.

        Raises:
            ValueError: heads of another number or size than this map was built for.
        """
        num_heads, head_dim, _ = self.weight.shape
        if (x.shape[1], x.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"the input has {x.shape[1]} heads of {x.shape[3]}, but the learned maps are for {num_heads} heads of "
                f"{head_dim}: build with the `num_heads` and `head_dim` of the input"
            )
        return x @ self.weight.to(x.dtype) + self.bias.to(x.dtype)


def gaussian_map(
    num_heads: int, head_dim: int, outputs: int, generator: torch.Generator, bias: float | Tensor = 0.0
) -> HeadMap:
    """Weights from N(0, 1/head_dim), so that unit Gaussian tokens give unit Gaussian outputs around the bias."""
    weight = torch.randn(num_heads, head_dim, outputs, generator=generator, device="cpu") * head_dim**-0.5
    start = torch.zeros(num_heads, 1, outputs, device="cpu") + bias
    return HeadMap(weight, start)
