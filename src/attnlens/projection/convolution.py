"""A short causal depthwise convolution: each channel sees its own last few tokens.

y_t = sum_{j=0}^{K-1} w_j * x_{t-j} per channel. It lets a key carry what stood just before it, which recall needs and
attention without positions cannot do.

Reference: "Hungry hungry hippos: towards language modeling with state space models", Fu et al., 2023 (the shift that
recall needs); used on q, k and v in "Gated linear attention transformers with hardware-efficient training", Yang et
al., 2024.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn


@final
class ShortConvolution(nn.Module):
    """Starts near the identity: the tap of the present token is one, all have noise of `std` added.

    Args:
        num_channels: of the input.
        kernel_size: number of taps K; at least 1.
        std: standard deviation of the noise on the taps.

    Raises:
        ValueError: `kernel_size` below 1.
    """

    def __init__(self, num_channels: int, kernel_size: int, *, std: float = 0.02) -> None:
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"`short_convolution` must be at least 1, got {kernel_size}; use null for none")
        weight = torch.empty(kernel_size, num_channels).normal_(std=std)
        weight[0] += 1
        self.weight = nn.Parameter(weight)

    def forward(self, x: Float[Tensor, "b n c"], past: Float[Tensor, "b p c"]) -> Float[Tensor, "b n c"]:
        """Convolve `x` that follows `past` (p = K - 1 tokens; zeros at the start of a sequence)."""
        n, taps = x.shape[1], self.weight.shape[0]
        padded = torch.cat([past, x], dim=1)
        # A sum of shifted products: on CPU at these widths faster than a grouped convolution, backward included.
        y = self.weight[0] * x
        for lag in range(1, taps):
            y = y + self.weight[lag] * padded[:, taps - 1 - lag : taps - 1 - lag + n]
        return y
