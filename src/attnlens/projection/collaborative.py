r"""Collaborative multi-head attention: the heads share one query and one key map and weigh its columns differently.

    scores_h = s (x W~_Q diag(m_h)) (y W~_K)^T (+ s y v_h),  s = 1/sqrt(d_head),  M = (m_h) of H x R,
    y = concat_h(softmax(scores_h) x W_V_h) W_O.

So W^Q_h W^K_h^T = W~_Q diag(m_h) W~_K^T for all heads: the canonical polyadic decomposition (rank R) of the d x d x H
tensor of these products. With R = H d_head, the maps of all heads side by side and m_h the indicator of block h, it
equals multi-head attention; so it starts. The content bias v_h = W^K_h b^Q_h carries a query bias exactly: the other
terms of (x W_Q + b_Q)(y W_K + b_K)^T do not depend on y, and softmax removes them.

Cost: scores are O(N^2 R H), d_head replaced by R (the survey's O(R N d_head H) is not their cost); the keys are shared.
Cache: R + H d_head floats a token (and H with a content bias); values stay those of multi-head attention.

Reference: "Multi-head attention: collaborate instead of concatenate", Cordonnier, Loukas and Jaggi, 2020,
https://arxiv.org/abs/2006.16362. A rotation between W~_Q and W~_K^T depends on the positions and belongs to no fixed
W~_Q, W~_K, M: rotating positions are refused.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.position.base import AbstractPosition
from attnlens.projection.base import Dims
from attnlens.projection.cost import Cost, Shape
from attnlens.projection.factored import AbstractFactored, Kept


def concatenated(num_heads: int, rank: int) -> Float[Tensor, "h r"]:
    """The mixing that gives every head its own block of columns: ones on a block diagonal, as even as may be.

    With fewer columns than heads, neighboring heads share one.
    """
    columns, heads = torch.arange(rank), torch.arange(num_heads)
    if rank < num_heads:
        return (heads[:, None] * rank // num_heads == columns).to(torch.get_default_dtype())
    return (columns * num_heads // rank == heads[:, None]).to(torch.get_default_dtype())


@final
class Collaborative(AbstractFactored):
    """Shared queries and keys around any operator, which is given them at width R (R + 1 with a content bias).

    Args:
        attention: the operator.
        width: of the tokens; a multiple of `num_heads`.
        num_heads: heads.
        rank: R, the shared columns; at most `width`, where every multi-head attention without rotation is one.
        content_bias: whether tokens have a score of their own in every head.
        bias: whether values and outputs have one.
        position: must not rotate.

    Raises:
        ValueError: `width` is no multiple of `num_heads`, `rank` below 1 or above `width`, a rotating `position`, or
            an operator of higher arity.
    """

    def __init__(
        self,
        attention: AbstractAttention,
        width: int,
        num_heads: int,
        rank: int,
        *,
        content_bias: bool = False,
        bias: bool = False,
        position: AbstractPosition | None = None,
    ) -> None:
        super().__init__(attention, None)
        if width % num_heads:
            raise ValueError(f"`width` must be a multiple of `num_heads`, got {width} and {num_heads}")
        if not 1 <= rank <= width:
            raise ValueError(f"`rank` must be between 1 and `width` = {width}, where it is exact, got {rank}")
        if position is not None:
            raise ValueError(
                f"`position` {type(position).__name__} rotates queries and keys, which a product of fixed maps cannot "
                "follow: use position=none, learned or sinusoidal, or projection=mha, gqa or mla"
            )
        self.num_heads, self.rank = num_heads, rank
        self.head_dims = (rank + content_bias, width // num_heads)
        self.kept = (rank, num_heads, width) if content_bias else (rank, width)
        self.scale = (width // num_heads) ** -0.5
        self.to_query = nn.Linear(width, rank, bias=False)  # W~_Q
        self.key = nn.Linear(width, rank, bias=False)  # W~_K
        self.mixing = nn.Parameter(concatenated(num_heads, rank))  # M
        self.content = nn.Linear(width, num_heads, bias=False) if content_bias else None  # v_h
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    @classmethod
    def dims(cls, width: int, num_heads: int, options: Mapping[str, Any]) -> Dims:
        """The operator's queries and keys are the shared columns, and one more with a content bias."""
        return Dims(options["rank"] + bool(options.get("content_bias")), width // num_heads)

    @classmethod
    def cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        """Maps N d (2 R + H d_head), scores N M H R, means N M H d_head, final N H d_head d; cache R + H d_head."""
        (d, heads, e), rank, content = shape, options["rank"], bool(options.get("content_bias"))
        pairs, maps, final = new * (past + new), d * (2 * rank + content * heads + heads * e), heads * e * d
        scores, means = pairs * heads * (rank + content), pairs * heads * e
        cache, weights = rank + content * heads + heads * e, maps + heads * rank + final
        return Cost(new * maps, scores, means, new * final, cache, weights)

    @classmethod
    def compressed_cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        """The same, but that a content bias is added and not multiplied."""
        cost, content = cls.cost(shape, options, new=new, past=past), bool(options.get("content_bias"))
        return cost._replace(scores=cost.scores - content * new * (past + new) * shape.num_heads)

    def query(self, x: Float[Tensor, "b n w"]) -> tuple[Float[Tensor, "b h n r"]]:
        return (self.to_query(x)[:, None] * self.mixing[:, None],)

    def keep(self, x: Float[Tensor, "b n w"]) -> Kept:
        content = () if self.content is None else (self.content(x),)
        return (self.key(x), *content, self.value(x))

    def expand_query(self, query: tuple[Tensor, ...]) -> Float[Tensor, "b h n d"]:
        q = query[0]
        if self.content is not None:
            q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
        return q * (self.scale * self.head_dims[0] ** 0.5)

    def expand(self, kept: Kept) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]]:
        k = kept[0][:, None].expand(-1, self.num_heads, -1, -1)
        if self.content is not None:
            k = torch.cat([k, kept[1].mT[..., None]], -1)
        return k, kept[-1].unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def scores(self, query: tuple[Tensor, ...], kept: Kept) -> Float[Tensor, "b h n m"]:
        q = query[0] * self.scale
        scores = (q.flatten(1, 2) @ kept[0].mT).unflatten(1, q.shape[1:3])
        return scores if self.content is None else scores + self.scale * kept[1].mT[:, :, None]

    def mix(self, weights: Float[Tensor, "b h n m"], kept: Kept) -> Float[Tensor, "b h n dv"]:
        return weights @ kept[-1].unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge(self, out: Float[Tensor, "b h n dv"]) -> Float[Tensor, "b n w"]:
        return self.output(out.transpose(1, 2).flatten(2))
