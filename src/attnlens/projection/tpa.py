r"""Tensor product attention: a token's queries, keys and values are short sums of outer products, heads x features.

    Q(x) = 1/R_Q sum_r a^Q_r(x) (x) b^Q_r(x),   a_r(x) = x W^a_r in R^H,  b_r(x) = x W^b_r in R^{d_head};  K, V alike;
    y = concat_h(softmax(s Q_h K_h^T) V_h) W^O,   s = 1/sqrt(d_head).

Higher order: b_r(x) (x) c_r(x) with d_b d_c = d_head in place of b_r(x), and so on. A rotation by position turns b_r,
the same as turning all heads (at higher order the last factor, so that every block of d_c columns turns at the same
rates). Scores need no keys and outputs no values:

    <q_h, k_h> = 1/(R_Q R_K) sum_{r,t} a^Q_r[h] a^K_t[h] <b^Q_r, b^K_t>,   and at higher order  <b, b'> <c, c'>.

With constant a (`contextual` false) it is multi-head attention for R = H and a_r = R e_r, grouped-query attention with
G groups for R_K = R_V = G and a_r = G on group r, multi-query attention for R_K = R_V = 1: so it starts, and constants
are not cached. Cache: (R_K + R_V)(H + d_head) floats a token, (R_K + R_V) d_head with constants, and d_b + d_c + ... in
place of d_head at higher order. Forming Q, K, V: O(N H d_head (R_Q + R_K + R_V)).

Reference: "Tensor product attention is all you need", Zhang et al., 2025, https://arxiv.org/abs/2501.06425. Departures:
constants a are trained like other weights; a step chooses the cheaper order of summation; maps start as
Xavier-uniform, at higher order so that b (x) c has the variance of b.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.position.base import AbstractPosition
from attnlens.projection.base import Dims
from attnlens.projection.cost import Cost, Shape
from attnlens.projection.factored import AbstractFactored, Kept


def grouped(num_heads: int, rank: int) -> Float[Tensor, "r h"]:
    """The constants a_r = R on the heads of group r that make the sum of R products grouped-query attention."""
    groups = torch.arange(num_heads) * rank // num_heads
    return rank * (torch.arange(rank)[:, None] == groups).to(torch.get_default_dtype())


class Factors(nn.Module):
    """The factors of the queries, keys or values.

    Args:
        width: of the tokens.
        num_heads: H.
        sizes: of the feature factors.
        rank: number of products in the sum.
        contextual: whether the factor of the heads is a map of the token, or a constant.
    """

    def __init__(self, width: int, num_heads: int, sizes: Sequence[int], rank: int, *, contextual: bool) -> None:
        super().__init__()
        self.rank, self.num_heads, self.contextual = rank, num_heads, contextual
        self.widths = tuple(rank * size for size in ((num_heads, *sizes) if contextual else sizes))
        self.maps = nn.ModuleList(nn.Linear(width, size, bias=False) for size in self.widths)
        heads, features = 2 / (width + rank * num_heads), 2 / (width + rank * math.prod(sizes))
        # b (x) c starts with the variance of the b of order 2; with Xavier's for each it would be larger.
        variances = [heads] * contextual + [(width * features) ** (1 / len(sizes)) / width] * len(sizes)
        for each, variance in zip(self.maps, variances, strict=True):
            nn.init.uniform_(next(each.parameters()), -((3 * variance) ** 0.5), (3 * variance) ** 0.5)
        self.constant = None if contextual else nn.Parameter(grouped(num_heads, rank))

    def forward(self, x: Float[Tensor, "b n w"]) -> Kept:
        """The factors side by side, those of the heads first where they depend on the token."""
        return tuple(to(x) for to in self.maps)

    def heads(self, kept: Kept) -> Float[Tensor, "#b #n r h"]:
        """a_r / R: the prefactor of the sum goes with the heads."""
        a = kept[0].unflatten(-1, (self.rank, -1)) if self.constant is None else self.constant[None, None]
        return a / self.rank

    def features(self, kept: Kept) -> list[Float[Tensor, "b n r d"]]:
        """b_r, and what follows at higher order."""
        return [part.unflatten(-1, (self.rank, -1)) for part in kept[self.contextual :]]

    def rows(self, kept: Kept) -> Float[Tensor, "b n r d"]:
        """b_r (x) c_r (x) ..., flattened."""
        first, *others = self.features(kept)
        for other in others:
            first = (first[..., None] * other[..., None, :]).flatten(-2)
        return first

    def expand(self, kept: Kept) -> Float[Tensor, "b h n d"]:
        """The sums of products, head by head."""
        return (self.heads(kept).mT @ self.rows(kept)).transpose(1, 2)


@final
class Tpa(AbstractFactored):
    """Tensor product attention around any operator.

    Args:
        attention: the operator.
        width: of the tokens; a multiple of `num_heads`.
        num_heads: heads.
        query_rank, key_rank, value_rank: R_Q, R_K, R_V, at most `width`.
        feature_dims: sizes of the feature factors, whose product is the width of a head; None for that width alone,
            which is order 2 (heads x features). The last is what a position turns.
        contextual: whether the factors of the heads depend on the token; if not, ranks must divide `num_heads`.
        position: turns the last feature factor, or None.

    Raises:
        ValueError: a rank below 1, above `width`, or no divisor of `num_heads` where not `contextual`; feature
            dimensions whose product is not the width of a head; `width` no multiple of `num_heads`; or an operator of
            higher arity.
    """

    def __init__(
        self,
        attention: AbstractAttention,
        width: int,
        num_heads: int,
        query_rank: int,
        key_rank: int,
        value_rank: int,
        *,
        feature_dims: Sequence[int] | None = None,
        contextual: bool = True,
        position: AbstractPosition | None = None,
    ) -> None:
        super().__init__(attention, position)
        if width % num_heads:
            raise ValueError(f"`width` must be a multiple of `num_heads`, got {width} and {num_heads}")
        head_dim = width // num_heads
        sizes = (head_dim,) if feature_dims is None else tuple(feature_dims)
        if math.prod(sizes) != head_dim or not sizes:
            raise ValueError(f"`feature_dims` must multiply to the width of a head, {head_dim}, got {list(sizes)}")
        ranks = {"query_rank": query_rank, "key_rank": key_rank, "value_rank": value_rank}
        for name, rank in ranks.items():
            _check_rank(name, rank, width, num_heads, contextual)
        self.num_heads, self.head_dims, self.scale = num_heads, (head_dim, head_dim), head_dim**-0.5
        self.queries, self.keys, self.values = (
            Factors(width, num_heads, sizes, rank, contextual=contextual) for rank in ranks.values()
        )
        self.kept = self.keys.widths + self.values.widths
        self.output = nn.Linear(width, width, bias=False)

    @classmethod
    def dims(cls, width: int, num_heads: int, options: Mapping[str, Any]) -> Dims:
        """A position turns the last feature factor."""
        head_dim = width // num_heads
        return Dims(head_dim, (options.get("feature_dims") or [head_dim])[-1])

    @classmethod
    def cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        """Maps N d (R_Q + R_K + R_V)(H + d_head) and the sums (N R_Q + M R_K + M R_V) H d_head; then attention.

        Scores and means N M H d_head each, final N H d_head d; cache (R_K + R_V)(H + d_head). With constants H falls
        away in the first and the last; at higher order d_b + d_c + ... stand for d_head there.
        """
        (_, heads, e), (q, k, v) = shape, _ranks(options)
        down, cache, weights = _sizes(shape, options)
        keys = past + new
        maps = new * down + (new * q + keys * (k + v)) * heads * e
        pairs = new * keys * heads * e
        return Cost(maps, pairs, pairs, new * heads * e * shape.width, cache, weights)

    @classmethod
    def compressed_cost(cls, shape: Shape, options: Mapping[str, Any], *, new: int, past: int = 0) -> Cost:
        """Scores N M R_K R_Q (d_head + H) or N R_Q H d_head + N M R_K H d_head, means N M H R_V d_head.

        Left out are the sums over the ranks of keys, N M H R_K, which are no matrix product.
        """
        (_, heads, e), (q, k, v), sizes = shape, _ranks(options), options.get("feature_dims") or [shape.head_dim]
        down, cache, weights = _sizes(shape, options)
        pairs = new * (past + new)
        through_ranks = q * (sum(sizes) + heads) < heads * e
        scores = pairs * k * q * (sum(sizes) + heads) if through_ranks else (new * q + pairs * k) * heads * e
        return Cost(new * down, scores, pairs * heads * v * e, new * heads * e * shape.width, cache, weights)

    def query(self, x: Float[Tensor, "b n w"]) -> tuple[Tensor, ...]:
        return self.queries(x)

    def keep(self, x: Float[Tensor, "b n w"]) -> Kept:
        return self.keys(x) + self.values(x)

    def place(self, query: tuple[Tensor, ...], kept: Kept, offset: int) -> tuple[tuple[Tensor, ...], Kept]:
        if self.position is None:
            return query, kept
        last = len(self.keys.widths) - 1
        q = query[-1].unflatten(-1, (self.queries.rank, -1)).transpose(1, 2)
        k = kept[last].unflatten(-1, (self.keys.rank, -1)).transpose(1, 2)
        q, k = (z.transpose(1, 2).flatten(2) for z in self.position.rotate(q, k, offset=offset))
        return (*query[:-1], q), (*kept[:last], k, *kept[last + 1 :])

    def expand_query(self, query: tuple[Tensor, ...]) -> Float[Tensor, "b h n d"]:
        return self.queries.expand(query)

    def expand(self, kept: Kept) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n dv"]]:
        keys, values = self._parts(kept)
        return self.keys.expand(keys), self.values.expand(values)

    def scores(self, query: tuple[Tensor, ...], kept: Kept) -> Float[Tensor, "b h n m"]:
        keys, _ = self._parts(kept)
        # (b, h, n, m, t) for the t-th product of a key, then summed over t with the weights of its heads.
        products = self._products(query, keys).unflatten(-1, (-1, self.keys.rank))
        weights = self.keys.heads(keys).movedim(-1, 1)[:, :, None]
        return (products * weights).sum(-1) * self.scale

    def mix(self, weights: Float[Tensor, "b h n m"], kept: Kept) -> Float[Tensor, "b h n dv"]:
        _, values = self._parts(kept)
        spread = weights[..., None] * self.values.heads(values).movedim(-1, 1)[:, :, None]
        return (spread.flatten(3).flatten(1, 2) @ self.values.rows(values).flatten(1, 2)).unflatten(
            1, weights.shape[1:3]
        )

    def merge(self, out: Float[Tensor, "b h n dv"]) -> Float[Tensor, "b n w"]:
        return self.output(out.transpose(1, 2).flatten(2))

    def _products(self, query: tuple[Tensor, ...], keys: Kept) -> Float[Tensor, "b h n mt"]:
        """<q_h, b^K_t> for every product t of every key, by the cheaper of two orders of summation."""
        ours, theirs = self.queries.features(query), self.keys.features(keys)
        through_ranks = self.queries.rank * (sum(z.shape[-1] for z in ours) + self.num_heads)
        if through_ranks < self.num_heads * self.head_dims[0]:
            grams = [a.flatten(1, 2) @ b.flatten(1, 2).mT for a, b in zip(ours, theirs, strict=True)]
            gram = math.prod(grams[1:], start=grams[0]).unflatten(1, (-1, self.queries.rank))
            return (self.queries.heads(query).mT @ gram).transpose(1, 2)
        q = self.queries.expand(query)
        return (q.flatten(1, 2) @ self.keys.rows(keys).flatten(1, 2).mT).unflatten(1, q.shape[1:3])

    def _parts(self, kept: Kept) -> tuple[Kept, Kept]:
        """Of the keys, and of the values."""
        count = len(self.keys.widths)
        return kept[:count], kept[count:]


def _ranks(options: Mapping[str, Any]) -> tuple[int, int, int]:
    return options["query_rank"], options["key_rank"], options["value_rank"]


def _sizes(shape: Shape, options: Mapping[str, Any]) -> tuple[int, int, int]:
    """Floats of the maps to factors, of the cache, and of all weights."""
    (d, heads, e), (q, k, v) = shape, _ranks(options)
    features, contextual = sum(options.get("feature_dims") or [e]), options.get("contextual", True)
    factors = features + heads * contextual
    constants = 0 if contextual else (q + k + v) * heads
    down = d * (q + k + v) * factors
    return down, (k + v) * factors, down + constants + heads * e * d


def _check_rank(name: str, rank: int, width: int, num_heads: int, contextual: bool) -> None:
    if not 1 <= rank <= width:
        raise ValueError(f"`{name}` must be between 1 and `width` = {width}, got {rank}")
    if not contextual and num_heads % rank:
        raise ValueError(
            f"`{name}` must divide `num_heads` = {num_heads} where the heads' factors are constants, got {rank}; "
            "or set `contextual` true"
        )
