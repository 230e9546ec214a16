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
        return self.linear(mean_of_real(x, key_padding_mask))


@final
class MeanHead(nn.Module):
    """The mean over real tokens itself: an embedding of the sequence."""

    def forward(
        self, x: Float[Tensor, "b n w"], *, key_padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b w"]:
        return mean_of_real(x, key_padding_mask)


def mean_of_real(x: Float[Tensor, "b n w"], key_padding_mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b w"]:
    """The mean over real tokens; zero for a sequence of padding alone, which has none."""
    if key_padding_mask is None:
        return x.mean(dim=1)
    real = key_padding_mask[..., None]
    return torch.where(real, x, 0).sum(dim=1) / real.sum(dim=1).clamp(min=1)


@final
class VectorHead(nn.Module):
    """The vectors themselves, which a decoder attends to."""

    def forward(
        self, x: Float[Tensor, "b n w"], *, key_padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n w"]:
        return x
