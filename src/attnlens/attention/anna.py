"""ANNA: the mean of the values whose keys share a hash bucket with the query, over several tables of buckets.

A table r of l has K functions of the E2LSH family, and a bucket is a K-tuple of cells:

    g_r(x) = (floor((<w_rt, x> + b_rt) / width))_{t = 1..K},   w ~ N(0, I),  b ~ U[0, width),
    C_ij = sum_r 1[g_r(q_i) = g_r(k_j)],   out_i = sum_j C_ij v_j / sum_j C_ij   (zero where no bucket holds a key).

No pair is formed: a table stores for each bucket the sum and the number of its values, and a query reads one bucket a
table. Time O(l n (K d + dv) + l n log n), memory O(n dv) a table in flight. Causal, keys are sorted by
(bucket, position) and summed within buckets up to the query's position, with one more factor log n: a row depends on
its own query and on equality of buckets with the past, so nothing leaks.

It is its own target, a piecewise constant function of q and k. With p(u) the probability that one cell holds two
vectors at distance u, for every pair P(C_ij > 0) = 1 - (1 - p^K)^l and E C_ij = l p^K. Hence, for radii r < c r, with
probability at least 1 - `failure_bound`, for all pairs at once

    |q_i - k_j| >  c r  =>  w_ij = 0,        |q_i - k_j| <= r  =>  w_ij >= 1 / ((|{j: |q_i - k_j| <= c r}| - 1) l + 1):

if every near pair meets and no far pair does, then C_ij >= 1 and the other neighbors count l times each at most. As l
grows, out tends to `expected_mean`, the kernel smoother with weights p(|q_i - k_j|)^K, with an error O(l^{-1/2}).

Source: "Fast attention mechanisms: a tale of parallelism" (Liu, Yu, Sanford, Andoni, Hsu, 2025),
https://arxiv.org/abs/2509.09001. Departures: a query without a neighbor gives zero, where a weight that sums to one
would have to fall on a far key; tuples are compared by a random 64-bit number; codes are hard, so q and k have no
gradient (the paper trains softmax attention and carries its weights over), unless `straight_through` passes them that
of the limit, at quadratic cost.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.hashing import (
    causal_table_sums,
    fused_code,
    line_cells,
    line_collision,
    shared_ids,
    table_sums,
)
from attnlens.linalg.prefix import normalized

ROWS = 256
IN_FLIGHT = 2**22  # elements of gathered values at a time


def collision_counts(
    of_queries: Int[Tensor, "b h n r t"], of_keys: Int[Tensor, "b h m r t"]
) -> Float[Tensor, "b h n m"]:
    """C by its definition, pair by pair, in float64."""
    pairs = zip(of_queries.unbind(3), of_keys.unbind(3), strict=True)
    return sum((x[:, :, :, None] == y[:, :, None]).all(-1).double() for x, y in pairs)  # pyright: ignore


def expected_weights(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], width: float, num_functions: int
) -> Float[Tensor, "b h n m"]:
    """p(|q_i - k_j|)^K, the expectation of C_ij / l."""
    # The expansion of |q - k|^2 loses half of the digits of a small distance.
    distance = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")
    return line_collision(distance, width).pow(num_functions)


def expected_mean(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    width: float,
    num_functions: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The limit of infinitely many tables, `ROWS` queries at a time."""
    outs = []
    for start in range(0, q.shape[2], ROWS):
        stop = min(start + ROWS, q.shape[2])
        seen = stop if causal else k.shape[2]
        weights = expected_weights(q[:, :, start:stop], k[:, :, :seen], width, num_functions)
        weights = weights.tril(start) if causal else weights
        if key_padding_mask is not None:
            weights = weights * key_padding_mask[:, None, None, :seen]
        outs.append(normalized(weights @ v[:, :, :seen], weights.sum(-1)))
    return torch.cat(outs, 2)


def bucket_mean(
    of_queries: Int[Tensor, "b h n r t"],
    of_keys: Int[Tensor, "b h m r t"],
    v: Float[Tensor, "b h m dv"],
    multipliers: Int[Tensor, " t"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """sum_j C_ij v_j / sum_j C_ij, as many tables at a time as keep the gathered values small."""
    (b, h, n), m = of_queries.shape[:3], v.shape[2]
    real = torch.ones_like(v[..., :1]) if key_padding_mask is None else key_padding_mask[:, None, :, None].to(v)
    counted = torch.cat([v, real.expand(b, h, m, 1)], -1)
    codes = (fused_code(x, multipliers).mT.contiguous() for x in (of_queries, of_keys))
    of_queries, of_keys = shared_ids(*codes)
    num_tables = of_keys.shape[2]
    step = max(1, min(num_tables, IN_FLIGHT // (b * h * (n + m) * counted.shape[-1])))
    total = v.new_zeros(b, h, n, counted.shape[-1])
    for start in range(0, num_tables, step):
        some = slice(start, start + step)
        codes = of_queries[:, :, some].contiguous(), of_keys[:, :, some].contiguous()
        total = total + (causal_table_sums(*codes, counted) if causal else table_sums(*codes, counted, m + 1))
    return normalized(total[..., :-1], total[..., -1])


class Anna(AbstractAttention):
    """Approximate nearest neighbor attention.

    Args:
        num_tables: l, at least 1.
        num_functions: K, the cells that make a bucket of a table, at least 1.
        width: of a cell, above 0, in the units of |q - k|.
        head_dim: of queries and keys.
        num_heads: each has its own directions and offsets.
        seed: of all draws.
        straight_through: whether the gradient is that of `expected_mean` in place of zero for q and k.
    """

    family = "clustering"
    budget = "num_tables"
    target = "itself"
    unbiased = True
    one_query = True

    def __init__(
        self,
        num_tables: int,
        num_functions: int,
        width: float,
        head_dim: int,
        num_heads: int,
        seed: int,
        straight_through: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("num_tables", num_tables), ("num_functions", num_functions)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if not width > 0:
            raise ValueError(f"`width` must be above 0, got {width}: it is the size of a cell of the hash")
        self.num_tables, self.num_functions, self.width = num_tables, num_functions, width
        self.straight_through = straight_through
        generator = torch.Generator().manual_seed(seed)
        size = num_tables * num_functions
        self.directions: Tensor
        self.offsets: Tensor
        self.multipliers: Tensor
        self.register_buffer("directions", torch.randn(num_heads, head_dim, size, generator=generator, device="cpu"))
        self.register_buffer("offsets", width * torch.rand(num_heads, size, generator=generator, device="cpu"))
        least, most = -(2**63), 2**63 - 1
        draw = torch.randint(least, most, (num_functions,), generator=generator, device="cpu")
        self.register_buffer("multipliers", draw)

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """It is its own definition."""
        return {}

    def failure_bound(self, radius: float, factor: float, num_near: int, num_far: int) -> float:
        """num_near (1 - p(r)^K)^l + num_far l p(c r)^K, for r = `radius`, c = `factor`: a bound on the probability that
        one of `num_near` pairs within r never meets or one of `num_far` pairs beyond c r does."""
        distance = torch.tensor([radius, factor * radius], dtype=torch.float64)
        near, far = line_collision(distance, self.width).pow(self.num_functions).tolist()
        return num_near * (1 - near) ** self.num_tables + num_far * self.num_tables * far

    def cells(self, x: Float[Tensor, "b h n d"]) -> Int[Tensor, "b h n r t"]:
        """The cell of every function of every table."""
        cells = line_cells(x, self.directions, self.offsets, self.width)
        return cells.unflatten(-1, (self.num_tables, self.num_functions))

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """The counts C, materialized, times the values, each row divided by its sum; float64."""
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            k, v = torch.where(real, k, 0), torch.where(real, v, 0)
        counts = collision_counts(self.cells(q.double()), self.cells(k.double()))
        counts = counts.tril() if causal else counts
        if key_padding_mask is not None:
            counts = counts * key_padding_mask[:, None, None]
        return normalized(counts @ v.double(), counts.sum(-1))

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """C / l of this draw."""
        return (collision_counts(self.cells(q), self.cells(k)) / self.num_tables).to(q.dtype)

    def kernel_target(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """E C / l = p(|q_i - k_j|)^K."""
        return expected_weights(q, k, self.width, self.num_functions)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        seen = {"causal": causal, "key_padding_mask": key_padding_mask}
        # A NaN query has the code of no key, which is healthy: its row is made NaN.
        out = bucket_mean(self.cells(q), self.cells(k), v, self.multipliers, **seen) + q.sum(-1, keepdim=True) * 0
        if not self.straight_through:
            return out
        limit = expected_mean(q, k, v, self.width, self.num_functions, **seen)
        return out.detach() + limit - limit.detach()
