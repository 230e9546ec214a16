"""Token ids to vectors."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@final
class TokenEmbedding(nn.Module):
    """A trained vector for each token of the vocabulary.

    Args:
        vocabulary_size: number of tokens.
        width: of the vectors.
        std: standard deviation of the vectors at first. It decides what is learned quickly: recall wants 0.02,
            language 0.5.
    """

    def __init__(self, vocabulary_size: int, width: int, *, std: float = 0.02) -> None:
        super().__init__()
        weight = torch.empty(vocabulary_size, width)
        # On the meta device there is nothing to draw, and asking would import a compiler: a second of loading a model.
        self.weight = nn.Parameter(weight if weight.is_meta else weight.normal_(std=std))

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n w"]:
        return nn.functional.embedding(input_ids, self.weight)
