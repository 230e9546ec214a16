r"""Rotary positions: queries and keys are turned by an angle proportional to their position.

With the halves of a vector as real and imaginary parts, z_t <- z_t exp(i t theta_j), theta_j = base^{-2j/d}, so that
<q_i, k_j> depends on the positions through i - j only.

Reference: "RoFormer: Enhanced Transformer with rotary position embedding", Su et al., 2021. The paper pairs
neighboring coordinates; here coordinate j is paired with j + d/2, the same up to a fixed permutation of the weights.
"""

from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.position.base import AbstractPosition


def rotate(
    x: Float[Tensor, "b h n d"], cos: Float[Tensor, "n e"], sin: Float[Tensor, "n e"]
) -> Float[Tensor, "b h n d"]:
    """Turn the pairs (x_j, x_{j+d/2}) by the angles whose cosines and sines are given (e = d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@final
class Rope(AbstractPosition):
    """Rotates queries and keys; nothing is added to the embeddings.

    Args:
        head_dim: of queries and keys; even.
        max_length: the longest sequence.
        base: the slowest rotation takes 2 pi times (almost) this many tokens.

    Raises:
        ValueError: `head_dim` is odd.
    """

    rotates: ClassVar[bool] = True
    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_length: int, *, base: float = 10000.0) -> None:
        super().__init__(max_length)
        if head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even for rotary positions, got {head_dim}; change `width` or `num_heads`"
            )
        theta = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(max_length, dtype=torch.float64)[:, None] * theta
        # In the default dtype: a model in float64 is built under that default, and half precision never loses the
        # angles, since `rotate` converts the cosines and not the angles.
        self.register_buffer("cos", angle.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angle.sin().to(torch.get_default_dtype()), persistent=False)

    def rotate(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], *, offset: int = 0
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b g n d"]]:
        self.check(offset + q.shape[2])
        cos = self.cos[offset : offset + q.shape[2]].to(q.dtype)
        sin = self.sin[offset : offset + q.shape[2]].to(q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin)
