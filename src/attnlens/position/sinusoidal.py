r"""Fixed sinusoids added to the embeddings.

p_{t, 2i} = sin(t / base^{2i/w}),  p_{t, 2i+1} = cos(t / base^{2i/w})

Reference: "Attention is all you need", Vaswani et al., 2017, section 3.5. The paper scales the embeddings by sqrt(w)
beforehand; here `scale` multiplies the sinusoids instead, since the embeddings' size is the model's choice.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.position.base import AbstractPosition


def sinusoids(length: int, width: int, base: float) -> Float[Tensor, "n w"]:
    """The table p in float64."""
    t = torch.arange(length, dtype=torch.float64)[:, None]
    angle = t * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


@final
class Sinusoidal(AbstractPosition):
    """Adds `scale` times the sinusoids to the embeddings.

    Args:
        width: of the embeddings.
        max_length: number of rows of the table.
        base: the longest wavelength is 2 pi times this, in tokens.
        scale: size of what is added.
    """

    table: Tensor

    def __init__(self, width: int, max_length: int, *, base: float = 10000.0, scale: float = 1.0) -> None:
        super().__init__(max_length)
        table = scale * sinusoids(max_length, width, base)
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def embed(self, x: Float[Tensor, "b n w"], *, offset: int = 0) -> Float[Tensor, "b n w"]:
        self.check(offset + x.shape[1])
        return x + self.table[offset : offset + x.shape[1]].to(x.dtype)
