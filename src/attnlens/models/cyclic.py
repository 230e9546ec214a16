"""Token ids that stand for residues modulo M, as points on circles."""

import math
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@final
class CyclicEmbedding(nn.Module):
    """A trained vector for each residue, at first std sqrt(2) (cos 2 pi f x/M, sin 2 pi f x/M) for f = 1 .. width/2.

    Sums of residues are then rotations from the first step on: what is learned is what the attention does with them,
    not the group.

    Args:
        vocabulary_size: M.
        width: of the vectors; even.
        std: root mean square entry at first.

    Raises:
        ValueError: `width` is odd.
    """

    def __init__(self, vocabulary_size: int, width: int, *, std: float = 0.5) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"`width` must be even, a cosine and a sine for every frequency, got {width}")
        residues, frequencies = torch.arange(vocabulary_size), torch.arange(1, width // 2 + 1)
        # Reduced before the division: at x f > M the angle in float32 would lose digits.
        angles = 2 * math.pi * (residues[:, None] * frequencies % vocabulary_size) / vocabulary_size
        self.weight = nn.Parameter(std * 2**0.5 * torch.cat([angles.cos(), angles.sin()], -1))

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n w"]:
        return nn.functional.embedding(input_ids, self.weight)
