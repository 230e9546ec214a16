"""Projections along the sequence: m keys and values to a few, by a matrix of shape (few, m) that ignores their content.

- `Learned`: a matrix for keys and one for values, parameters of every head, started as segment means.
- `Pooled`: means of consecutive segments of each example's own real tokens; nothing to learn, no longest length.
- `JohnsonLindenstrauss`: one Gaussian matrix a head, entries of variance 1 / num_keys, for keys and values alike.

Column j of a matrix belongs to the j-th real token of an example, wherever padding stands, so that its result does
not depend on the length to which it is padded.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.linalg.landmarks import segment, segment_means


class AbstractLengthProjection(nn.Module, ABC):
    """A rule that turns keys and values of m tokens into a few; sized once, by the operator that owns it."""

    @abstractmethod
    def allocate(self, num_keys: int) -> None:
        """Make what a projection to `num_keys` keys needs: parameters, draws or nothing."""

    @abstractmethod
    def forward(
        self, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m dv"], key_padding_mask: Bool[Tensor, "b m"] | None
    ) -> tuple[Float[Tensor, "b h r d"], Float[Tensor, "b h r dv"], Float[Tensor, "#b 1 1 r"] | None]:
        """Projected keys, projected values, and what is added to the scores of each key (None: nothing).

        Padded keys and values are zero on entry.
        """


class Pooled(AbstractLengthProjection):
    """Segment means. A segment of c tokens counts c times (log c on its score), so that equal keys give mean(V)."""

    num_keys: int

    def allocate(self, num_keys: int) -> None:
        self.num_keys = num_keys

    def forward(
        self, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m dv"], key_padding_mask: Bool[Tensor, "b m"] | None
    ) -> tuple[Float[Tensor, "b h r d"], Float[Tensor, "b h r dv"], Float[Tensor, "#b 1 1 r"]]:
        segments = segment(k.shape[2], self.num_keys, key_padding_mask, k.device)
        bias = segments.member.sum(-1).to(k.dtype).log()[:, None, None]
        return segment_means(k, segments), segment_means(v, segments), bias


class Learned(AbstractLengthProjection):
    """Parameters of every head, one matrix for keys and one for values.

    Args:
        num_heads: heads.
        max_length: the longest input.
    """

    def __init__(self, num_heads: int, max_length: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.max_length = max_length

    def allocate(self, num_keys: int) -> None:
        start = segment_matrix(num_keys, self.max_length).repeat(self.num_heads, 1, 1)
        self.keys = nn.Parameter(start)
        self.values = nn.Parameter(start.clone())

    def forward(
        self, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m dv"], key_padding_mask: Bool[Tensor, "b m"] | None
    ) -> tuple[Float[Tensor, "b h r d"], Float[Tensor, "b h r dv"], None]:
        return _project(self.keys, k, key_padding_mask), _project(self.values, v, key_padding_mask), None


class JohnsonLindenstrauss(AbstractLengthProjection):
    """A Gaussian draw: E |M x|^2 = |x|^2 along the sequence, which does not carry over to the softmax of M K.

    Args:
        num_heads: each draws its own matrix.
        max_length: the longest input.
        seed: of the draw.
    """

    def __init__(self, num_heads: int, max_length: int, seed: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.max_length = max_length
        self.seed = seed

    def allocate(self, num_keys: int) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randn(self.num_heads, num_keys, self.max_length, generator=generator, device="cpu")
        self.matrix: Tensor
        self.register_buffer("matrix", draw * num_keys**-0.5)

    def forward(
        self, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m dv"], key_padding_mask: Bool[Tensor, "b m"] | None
    ) -> tuple[Float[Tensor, "b h r d"], Float[Tensor, "b h r dv"], None]:
        return _project(self.matrix, k, key_padding_mask), _project(self.matrix, v, key_padding_mask), None


def segment_matrix(num_keys: int, length: int) -> Float[Tensor, "r m"]:
    """The matrix of segment means over `length` tokens: min(num_keys, length) rows that sum to one."""
    segments = segment(length, num_keys, None, torch.device("cpu"))
    positions, member = segments.positions[0], segments.member[0]
    weights = member / member.sum(-1, keepdim=True)
    return torch.zeros(positions.shape[0], length, device="cpu").scatter_add_(1, positions, weights)


def _project(
    matrix: Float[Tensor, "h r longest"], x: Float[Tensor, "b h m d"], key_padding_mask: Bool[Tensor, "b m"] | None
) -> Float[Tensor, "b h r d"]:
    """`matrix` times the real rows of x, the first column for the first of them; the other rows of x are zero."""
    m = x.shape[2]
    if m > matrix.shape[2]:
        raise ValueError(f"length {m} is beyond `max_length`={matrix.shape[2]}: build with a larger one")
    if key_padding_mask is not None:
        order = (~key_padding_mask).to(torch.uint8).argsort(dim=-1, stable=True)
        x = x.take_along_dim(order[:, None, :, None], 2)
    return matrix[..., :m].to(x.dtype) @ x
