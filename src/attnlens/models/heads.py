"""What follows the last norm: one answer for each token, one for the sequence, or the vectors as they are."""

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


@final
class TokenHead(nn.Module):
    """Logits for each token."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_outputs, bias=False)

    def forward(
        self, x: Float[Tensor, "b n w"], *, key_padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        return self.linear(x)


@final
class PooledHead(nn.Module):
    """Logits of the mean over real tokens."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_outputs)

    def forward(
        self, x: Float[Tensor, "b n w"], *, key_padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        if key_padding_mask is None:
            return self.linear(x.mean(dim=1))
        real = key_padding_mask[..., None]
        total = torch.where(real, x, 0).sum(dim=1)
        # A sequence of padding alone has no mean; zero is at least finite.
        return self.linear(total / real.sum(dim=1).clamp(min=1))


@final
class VectorHead(nn.Module):
    """The vectors themselves, which a decoder attends to."""

    def forward(
        self, x: Float[Tensor, "b n w"], *, key_padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n w"]:
        return x
