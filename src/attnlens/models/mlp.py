"""Networks applied to each token by itself."""

from collections.abc import Callable
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# The gates of "GLU variants improve Transformer": SwiGLU, GEGLU, ReGLU, GLU and its bilinear form.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


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


class AbstractGluMlp(nn.Module):
    """W2 (f(Wg x) * W1 x) for a gate f; an expansion of 8/3 has as many weights as a network without a gate of 4.

    Reference: "GLU variants improve Transformer", Shazeer, 2020, https://arxiv.org/abs/2002.05202.

    Raises:
        ValueError: an unknown `activation`.
    """

    def __init__(self, width: int, activation: str, *, expansion: float | int, bias: bool) -> None:
        super().__init__()
        if activation not in GATES:
            raise ValueError(f"`activation` is {activation!r}: choose one of {list(GATES)}")
        hidden = round(expansion * width)
        self.activation = activation
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.inner = nn.Linear(width, hidden, bias=bias)
        self.outer = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        return self.outer(GATES[self.activation](self.gate(x)) * self.inner(x))


@final
class GluMlp(AbstractGluMlp):
    """A gated network with the gate that is named.

    Args:
        width: of the tokens.
        activation: of the gate: "silu" (SwiGLU), "gelu" (GEGLU), "relu" (ReGLU), "sigmoid" (GLU) or "identity"
            (bilinear).
        expansion: the hidden width over `width`.
        bias: whether the linear maps have one.
    """

    def __init__(
        self, width: int, activation: str = "silu", *, expansion: float | int = 8 / 3, bias: bool = False
    ) -> None:
        super().__init__(width, activation, expansion=expansion, bias=bias)


@final
class SwigluMlp(AbstractGluMlp):
    """W2 (silu(Wg x) * W1 x), which is `GluMlp` with the gate of most language models."""

    def __init__(self, width: int, *, expansion: float | int = 8 / 3, bias: bool = False) -> None:
        super().__init__(width, "silu", expansion=expansion, bias=bias)
