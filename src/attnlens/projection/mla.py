r"""Multi-head latent attention: keys and values of all heads expand from one short latent vector a token.

    L = N(x W^LKV),  K_h = [L W^UK_h | R x W^RK],  V_h = L W^UV_h,      R: rotation by position, N: a norm or none,
    L_Q = N(x W^LQ) or x,  Q_h = [L_Q W^UQ_h | R L_Q W^RQ_h],
    y = concat_h(Attention(Q_h, K_h, V_h)) W^O,   scores s <q, k>,  s = 1/sqrt(d_head + d_R) unless given.

Merged, for decoding: <Q_h, K_h> = <[Q_h W^UK_h^T | Q^R_h], [L | K^R]> and P_h V_h = (P_h L) W^UV_h, so that all heads
are rows of one matrix against the one cache [L | K^R]. A rotation between W^UQ_h and W^UK_h^T would depend on both
positions and forbid the merging: hence the d_R rotated columns of their own, shared by the heads.

Cache: d_L + d_R floats a token. A decoding step over m tokens is O(m H (2 d_L + d_R)), in the expanded form
O(m d_L H d_head); a pair of a prompt costs 2 d_head + d_R expanded. Without rotated columns, norms and scale it equals
multi-head attention with W^K_h = W^LKV W^UK_h, W^V_h = W^LKV W^UV_h.

Reference: "DeepSeek-V2: a strong, economical, and efficient mixture-of-experts language model", DeepSeek-AI, 2024,
https://arxiv.org/abs/2405.04434. Departures: the norms of the latents are an option (the survey has none); no query
compression unless `query_rank` is given; the products W^UQ W^UK^T and W^UV W^O are applied factor by factor, which is
fewer numbers and less work, and formed by `merged` only; rotated columns are paired as in `position.rope`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.position.base import AbstractPosition
from attnlens.projection.base import Dims
from attnlens.projection.cost import Cost, Shape
from attnlens.projection.factored import AbstractFactored, Kept


class Merged(NamedTuple):
    """The maps of decoding, with what can be multiplied out multiplied out.

    latent: W^LKV. query: W^UQ_h W^UK_h^T, after W^LQ where there is no norm between. output: W^UV_h W^O.
    """

    latent: Float[Tensor, "w r"]
    query: Float[Tensor, "h q r"]
    output: Float[Tensor, "h r w"]


@final
class Mla(AbstractFactored):
    """Latent attention around any operator.

    Args:
        attention: the operator; it is given queries and keys of width content_dim + rotary_dim.
        width: of the tokens.
        num_heads: heads.
        rank: d_L, width of the latent of keys and values; at most `width`.
        rotary_dim: d_R, the columns that a position turns; even, 0 for none.
        query_rank: width of the latent of the queries, at most `width`, or None for no such latent.
        content_dim: width of a head's value and of its key without the rotated columns; width / num_heads by default.
        latent_norm: whether latents go through an RMSNorm.
        scale: of the scores; 1/sqrt(content_dim + rotary_dim) by default.
        position: turns the rotary columns, or None.

    Raises:
        ValueError: a rank below 1 or above `width`, an odd or negative `rotary_dim`, a rotating `position` and no
            columns for it, heads that do not divide `width`, or an operator of higher arity.
    """

    def __init__(
        self,
        attention: AbstractAttention,
        width: int,
        num_heads: int,
        rank: int,
        *,
        rotary_dim: int,
        query_rank: int | None = None,
        content_dim: int | None = None,
        latent_norm: bool = True,
        scale: float | None = None,
        position: AbstractPosition | None = None,
    ) -> None:
        super().__init__(attention, position)
        _check(width, num_heads, rank, query_rank, rotary_dim, content_dim, position)
        content = width // num_heads if content_dim is None else content_dim
        self.num_heads, self.rank, self.rotary_dim = num_heads, rank, rotary_dim
        self.head_dims, self.kept = (content + rotary_dim, content), (rank + rotary_dim,)
        self.scale = self.head_dims[0] ** -0.5 if scale is None else scale
        self.latent = nn.Linear(width, rank + rotary_dim, bias=False)  # [W^LKV | W^RK]
        self.latent_norm = nn.RMSNorm(rank, eps=1e-6) if latent_norm else nn.Identity()
        self.key = nn.Linear(rank, num_heads * content, bias=False)  # W^UK
        self.value = nn.Linear(rank, num_heads * content, bias=False)  # W^UV
        down = [] if query_rank is None else [nn.Linear(width, query_rank, bias=False)]
        norm = [nn.RMSNorm(query_rank, eps=1e-6)] if latent_norm and query_rank is not None else []
        self.latent_query = nn.Sequential(*down, *norm)
        inner = width if query_rank is None else query_rank
        self.to_query = nn.Linear(inner, num_heads * self.head_dims[0], bias=False)  # [W^UQ_h | W^RQ_h], head by head
        self.output = nn.Linear(num_heads * content, width, bias=False)

    @classmethod
    def dims(cls, width: int, num_heads: int, options: Mapping[str, Any]) -> Dims:
        """Queries and keys are as wide as content and rotated columns together; a position turns the latter."""
        content = options.get("content_dim") or width // num_heads
        return Dims(content + options["rotary_dim"], options["rotary_dim"])

    @classmethod
    def cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        """Keys and values of all tokens expand: maps N d (d_L + d_R) + 2 M d_L H d_head and those of the queries.

        Scores N M H (d_head + d_R), means N M H d_head, final N H d_head d; cache d_L + d_R.
        """
        (_, heads, e), rank, rotary = shape, options["rank"], options["rotary_dim"]
        to_latents, weights = _weights(shape, options)
        keys = past + new
        maps = new * to_latents + keys * 2 * rank * heads * e
        scores, means = new * keys * heads * (e + rotary), new * keys * heads * e
        return Cost(maps, scores, means, new * heads * e * shape.width, rank + rotary, weights)

    @classmethod
    def compressed_cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        """Scores N H d_head d_L + N M H (d_L + d_R), means N M H d_L + N H d_L d_head; nothing expands."""
        (_, heads, e), rank, rotary = shape, options["rank"], options["rotary_dim"]
        to_latents, weights = _weights(shape, options)
        through, pairs = new * heads * e * rank, new * (past + new) * heads
        scores, means = through + pairs * (rank + rotary), through + pairs * rank
        return Cost(new * to_latents, scores, means, new * heads * e * shape.width, rank + rotary, weights)

    @classmethod
    def merged_cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        """That of `merged_attention`, as the survey counts it: no rotated columns, W^UQ W^UK^T and W^UV W^O formed.

        Maps N d (d_LQ + d_L), scores N H d_LQ d_L + N M H d_L, means N M H d_L, final N H d_L d; cache d_L.
        """
        (d, heads, _), rank = shape, options["rank"]
        inner, pairs = options.get("query_rank"), new * (past + new) * heads
        maps = d * rank + (0 if inner is None else d * inner)
        through = heads * (d if inner is None else inner) * rank
        final = heads * rank * d
        return Cost(new * maps, new * through + pairs * rank, pairs * rank, new * final, rank, maps + through + final)

    def query(self, x: Float[Tensor, "b n w"]) -> tuple[Float[Tensor, "b h n d"]]:
        q = self.to_query(self.latent_query(x))
        return (q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2),)

    def keep(self, x: Float[Tensor, "b n w"]) -> Kept:
        latent, rotary = self.latent(x).split((self.rank, self.rotary_dim), -1)
        return (torch.cat([self.latent_norm(latent), rotary], -1),)

    def place(self, query: tuple[Tensor, ...], kept: Kept, offset: int) -> tuple[tuple[Tensor, ...], Kept]:
        if self.position is None:
            return query, kept
        content, q = query[0].split((self.head_dims[1], self.rotary_dim), -1)
        latent, k = kept[0].split((self.rank, self.rotary_dim), -1)
        q, k = self.position.rotate(q, k[:, None], offset=offset)
        return (torch.cat([content, q], -1),), (torch.cat([latent, k[:, 0]], -1),)

    def expand_query(self, query: tuple[Tensor, ...]) -> Float[Tensor, "b h n d"]:
        return query[0] * (self.scale * self.head_dims[0] ** 0.5)

    def expand(self, kept: Kept) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]]:
        latent, rotary = kept[0].split((self.rank, self.rotary_dim), -1)
        k, v = (to(latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for to in (self.key, self.value))
        return torch.cat([k, rotary[:, None].expand(-1, self.num_heads, -1, -1)], -1), v

    def scores(self, query: tuple[Tensor, ...], kept: Kept) -> Float[Tensor, "b h n m"]:
        rows = self._rows(query) * self.scale
        # The heads are rows of one product: the cache is read once, and not once a head.
        return (rows.flatten(1, 2) @ kept[0].mT).unflatten(1, rows.shape[1:3])

    def mix(self, weights: Float[Tensor, "b h n m"], kept: Kept) -> Float[Tensor, "b h n dv"]:
        rows = weights.flatten(1, 2) @ kept[0][..., : self.rank]
        return self.from_policy(rows.unflatten(1, weights.shape[1:3]))

    @property
    def policy_dims(self) -> tuple[int, int, int]:
        """One group for all heads: [L | K^R] are its keys, L its values."""
        return 1, self.rank + self.rotary_dim, self.rank

    def for_policy(
        self, query: tuple[Tensor, ...], kept: Kept
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b g n d"], Float[Tensor, "b g n dv"]]:
        rows = self._rows(query)
        return rows * (self.scale * rows.shape[-1] ** 0.5), kept[0][:, None], kept[0][:, None, :, : self.rank]

    def from_policy(self, out: Float[Tensor, "b h n _"]) -> Float[Tensor, "b h n dv"]:
        return out @ self.value.weight.unflatten(0, (self.num_heads, -1)).mT

    def _rows(self, query: tuple[Tensor, ...]) -> Float[Tensor, "b h n d"]:
        """[Q_h W^UK_h^T | Q^R_h], as wide as the cache."""
        content, rotary = query[0].split((self.head_dims[1], self.rotary_dim), -1)
        return torch.cat([content @ self.key.weight.unflatten(0, (self.num_heads, -1)), rotary], -1)

    def merge(self, out: Float[Tensor, "b h n dv"]) -> Float[Tensor, "b n w"]:
        return self.output(out.transpose(1, 2).flatten(2))

    def merged(self) -> Merged:
        """The merged maps of the content, for what they cost; decoding does not need them.

        `query` starts from the tokens, or from L_Q where a norm stands between.
        """
        content = self.head_dims[1]
        heads = self.to_query.weight.unflatten(0, (self.num_heads, -1))[:, :content]
        query = heads.mT @ self.key.weight.unflatten(0, (self.num_heads, -1))
        if len(self.latent_query) == 1:
            (down,) = self.latent_query.parameters()
            query = down.T @ query
        output = self.output.weight.T.unflatten(0, (self.num_heads, -1))
        value = self.value.weight.unflatten(0, (self.num_heads, -1))
        return Merged(self.latent.weight[: self.rank].T, query, value.mT @ output)


def merged_attention(
    merged: Merged, x: Float[Tensor, "b n w"], latent_query: Float[Tensor, "b n q"], scale: float
) -> Float[Tensor, "b n w"]:
    """sum_h softmax(s L_Q W^LQK_h L^T) L W^LO_h: the merged form by its formula, neither causal nor rotated."""
    latent = (x @ merged.latent)[:, None]
    scores = latent_query[:, None] @ merged.query @ latent.mT
    means = torch.softmax(scale * scores, -1) @ latent
    return means.transpose(1, 2).flatten(2) @ merged.output.flatten(0, 1)


def _weights(shape: Shape, options: Mapping[str, Any]) -> tuple[int, int]:
    """Those of the maps to latents and queries, and all."""
    (d, heads, e), rank, rotary = shape, options["rank"], options["rotary_dim"]
    inner, norms = options.get("query_rank"), options.get("latent_norm", True)
    query = d if inner is None else inner
    down = d * (rank + rotary) + query * heads * (e + rotary) + (0 if inner is None else d * inner)
    return down, down + 2 * rank * heads * e + heads * e * d + norms * (rank + (inner or 0))


def _check(
    width: int,
    num_heads: int,
    rank: int,
    query_rank: int | None,
    rotary_dim: int,
    content_dim: int | None,
    position: AbstractPosition | None,
) -> None:
    if content_dim is None and width % num_heads:
        raise ValueError(
            f"`width` must be a multiple of `num_heads`, got {width} and {num_heads}; or give `content_dim`"
        )
    for name, value in (("rank", rank), ("query_rank", query_rank)):
        if value is not None and not 1 <= value <= width:
            raise ValueError(f"`{name}` must be between 1 and `width` = {width}, got {value}: more adds nothing")
    if rotary_dim < 0 or rotary_dim % 2:
        raise ValueError(f"`rotary_dim` must be even and at least 0, got {rotary_dim}")
    if position is not None and rotary_dim == 0:
        raise ValueError(
            f"`rotary_dim` is 0, and {type(position).__name__} has nothing to turn: set it above 0, or use "
            "position=none or one that adds"
        )
