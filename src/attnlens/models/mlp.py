"""Networks applied to each token by itself."""

from typing import final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@final
class GeluMlp(nn.Module):
    """W2 gelu(W1 x), hidden width `expansion` times the width.

    Reference: "Gaussian error linear units", Hendrycks and Gimpel, 2016.
    """

    def __init__(self, width: int, *, expansion: float | int = 4.0, bias: bool = True) -> None:
        super().__init__()
        hidden = round(expansion * width)
        self.inner = nn.Linear(width, hidden, bias=bias)
        self.outer = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        return self.outer(F.gelu(self.inner(x)))


@final
class SwigluMlp(nn.Module):
    """W2 (silu(Wg x) * W1 x); an expansion of 8/3 has as many weights as a GELU network of 4.

    Reference: "GLU variants improve Transformer", Shazeer, 2020.
    """

    def __init__(self, width: int, *, expansion: float | int = 8 / 3, bias: bool = False) -> None:
        super().__init__()
        hidden = round(expansion * width)
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.inner = nn.Linear(width, hidden, bias=bias)
        self.outer = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        return self.outer(F.silu(self.gate(x)) * self.inner(x))
