r"""Attention with linear biases: scores fall in proportion to the distance, and any length will do.

    s_ij = <q_i, k_j>/sqrt(d) - m_h (i - j),   j <= i,   m_h = 2^{-8h/H},   h = 1 .. H.

Under a causal mask the bias has rank two, so that it is two more coordinates of queries and keys, and every operator
runs with it unchanged:

    q'_i = r [q_i, sqrt(d) m_h, -sqrt(d) m_h i],   k'_j = [k_j, j, 1],   r = sqrt((d + 2)/d),

<q'_i, k'_j>/sqrt(d + 2) = s_ij: operators scale by the width that they are given. The slopes stand in the queries, so
that query heads of one group share their keys. Softmax does not see -m_h i, which is constant in a row; with it scores
stay small and kernels other than the exponential get the bias itself.

Cost: two columns. Error: places are exact integers below 2^24 in float32, and the two products cancel to within
4 u m_h max(i, 1), u = 2^-24 the unit round-off: 1.0e-3 for the steepest slope 1/2 at i = 8192, where all but the last
few dozen keys weigh nothing. In half precision this is useless, and refused.

Reference: "Train short, test long: attention with linear biases enables input length extrapolation", Press, Smith,
Lewis, 2022, https://arxiv.org/abs/2108.12409, with its rule for H not a power of two. Departures: -m_h |i - j| of
bidirectional variants has full rank, and is refused. The paper leaves the row's constant out.
"""

from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.position.base import AbstractPosition


def slopes(num_heads: int) -> Float[Tensor, "h"]:
    """m_h in float64; beyond the largest power of two, every other slope of twice that number of heads."""
    whole = 2 ** (num_heads.bit_length() - 1)
    m = 2.0 ** (-8 * torch.arange(1, whole + 1, dtype=torch.float64) / whole)
    between = 2.0 ** (-4 * torch.arange(1, 2 * whole + 1, 2, dtype=torch.float64) / whole)
    return torch.cat([m, between[: num_heads - whole]])


def widen(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], m: Float[Tensor, "h"], offset: int
) -> tuple[Float[Tensor, "b h n d+2"], Float[Tensor, "b g n d+2"]]:
    """q' and k' of the tokens offset, ..., offset + n - 1; the new coordinates are rounded once, from float64."""
    (b, h, n, d), g = q.shape, k.shape[1]
    i = torch.arange(offset, offset + n, dtype=torch.float64, device=q.device)
    c = (d**0.5 * m.to(q.device, torch.float64))[:, None].expand(h, n)
    of_query = torch.stack([c, -c * i], -1).to(q.dtype).expand(b, h, n, 2)
    of_key = torch.stack([i, torch.ones_like(i)], -1).to(k.dtype).expand(b, g, n, 2)
    return torch.cat([q, of_query], -1) * ((d + 2) / d) ** 0.5, torch.cat([k, of_key], -1)


@final
class Alibi(AbstractPosition):
    """Biases scores by -m_h (i - j) through two more coordinates; nothing is added to the embeddings.

    Args:
        num_heads: H, of the queries.

    Raises:
        ValueError: `num_heads` below 1.
    """

    rotates: ClassVar[bool] = True
    extra_dims: ClassVar[int] = 2
    causal_only: ClassVar[bool] = True
    slopes: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__(max_length=None)
        if num_heads < 1:
            raise ValueError(f"`num_heads` must be at least 1, got {num_heads}")
        self.register_buffer("slopes", slopes(num_heads).to(torch.get_default_dtype()), persistent=False)

    def rotate(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], *, offset: int = 0
    ) -> tuple[Float[Tensor, "b h n d+2"], Float[Tensor, "b g n d+2"]]:
        """q' and k' of the module docstring.

        Raises:
            ValueError: another number of heads, or half precision.
        """
        if q.shape[1] != len(self.slopes):
            raise ValueError(f"`num_heads` of Alibi is {len(self.slopes)}, got queries of {q.shape[1]} heads")
        if q.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"`q` is {q.dtype}, in which places beyond a few hundred are no longer integers: run the model in "
                "float32, or use position=rope"
            )
        return widen(q, k, self.slopes, offset)
