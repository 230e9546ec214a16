"""LevAttention: polynomial attention restricted to the few keys that any query could weigh heavily.

    U = the `num_keys` keys with the largest bounds a_j of their p-sensitivity,
    out_i = sum_{j in U} |s_ij|^p v_j / (1 + sum_{j in U} |s_ij|^p),   s_ij = <q_i, k_j>/sqrt(d),

    sup over queries of |s_j|^p / (1 + sum_l |s_l|^p) <= a_j   (`linalg.lewis`; leverage scores for p = 2).

U is universal: whatever the queries, every weight above eps = max_{j not in U} a_j lies in its columns. The a_j sum to
d at most for p = 2 and to d (d + 1)^{p/2-1} with converged Lewis weights, so that eps <= that sum/(num_keys + 1) at any
length (above 1 it says nothing). This is certain, for queries with |q| <= `query_norm` (with `normalize`: for all).
Nothing of the kind holds for softmax, where a suitable query gives all its weight to any extreme key.

Time O(n num_keys (d + dv) + m d^2) for p = 2 and O(m d^2) an iteration more for p > 2; memory O(n d). Target:
`polynomial` of the same degree and normalization, equal to it at num_keys >= m.

Causal: a_j is a bound among the keys up to j, which later keys can only lower; row i uses the `num_keys` largest a_j,
j <= i, and has its own eps_i. The first keys to span the space have a_j near 1, whatever their length.

The sum over j not in U is dropped from the denominator, which inflates the weights in U. `num_samples` adds an unbiased
estimate of it, from uniformly sampled keys; bidirectional only.

Source: "LevAttention: Time, Space, and Streaming Efficient Algorithm for Heavy Attentions" (Kannan, Bhattacharyya,
Kacham, Woodruff, 2024), https://arxiv.org/abs/2410.05462. Departures: a budget of keys with the eps that it implies, in
place of an eps with the set that it implies, so that shapes are fixed; the one in the denominator, which turns leverage
scores into ridge leverage scores with ridge d/query_norm^2; the set holds no window of recent keys.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import take_rows
from attnlens.linalg.lewis import online_sensitivity_bounds, sensitivity_bounds
from attnlens.linalg.polynomial_kernel import dense, kernel_values, rows, scaled, streamed
from attnlens.linalg.sampling import uniform_sample
from attnlens.linalg.selected import top_indices, value_diameter

ROWS = 64


def causal_levattention(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    scores: Float[Tensor, "b h n"],
    num_keys: int,
    degree: int | float,
) -> Float[Tensor, "b h n dv"]:
    """Row i over the `num_keys` largest scores up to i; padded keys have the score -inf.

    Of the keys before a chunk only the `num_keys` best can be among the best of any of its rows.
    """
    outs, n = [], x.shape[2]
    kept = torch.zeros(*scores.shape[:2], 0, dtype=torch.long, device=x.device)
    for start in range(0, n, ROWS):
        own = torch.arange(start, min(start + ROWS, n), device=x.device)
        candidates = torch.cat([kept, own.expand(*kept.shape[:2], -1)], -1)
        level = scores.gather(-1, candidates)
        seen = candidates[:, :, None] <= own[:, None]
        of_rows = level[:, :, None].masked_fill(~seen, -torch.inf)
        best = top_indices(of_rows, min(num_keys, of_rows.shape[-1]))
        visible = torch.zeros_like(of_rows).scatter_(-1, best, 1) * (of_rows > -torch.inf)
        keys, values = take_rows(y, candidates), take_rows(v, candidates)
        outs.append(rows(x[:, :, start : start + ROWS], keys, values, degree, 0, visible.to(x.dtype)))
        # In the order of position, so that of equal scores the first is kept.
        slots = top_indices(level, min(num_keys, level.shape[-1])).sort(-1).values
        kept = candidates.gather(-1, slots)
    return torch.cat(outs, 2)


class LevAttention(AbstractAttention):
    """Polynomial attention over keys of large sensitivity.

    Args:
        num_keys: keys in U, at least 1.
        degree: p, real, at least 2.
        max_length: the longest input.
        num_heads: every head has its own sample.
        seed: of the sample.
        normalize: layer-normalize queries and keys; |q| is then sqrt(d) at most, whatever `query_norm` says.
        query_norm: the largest |q| for which the guarantee is given; smaller is sharper.
        iterations: of the Lewis weights, at least 1; without effect at degree 2.
        num_samples: keys sampled for the tail of the denominator, 0 for none.
    """

    family = "kernel"
    budget = "num_keys"
    target = "polynomial"

    def __init__(
        self,
        num_keys: int,
        degree: int | float,
        max_length: int,
        num_heads: int,
        seed: int,
        normalize: bool = False,
        query_norm: int | float = 1e4,
        iterations: int = 2,
        num_samples: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_keys", num_keys, 1),
            ("degree", degree, 2),
            ("iterations", iterations, 1),
            ("num_samples", num_samples, 0),
        ):
            if not value >= least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        if not query_norm > 0:
            raise ValueError(f"`query_norm` must be positive, got {query_norm}; 1e4 bounds any trained query")
        self.num_keys = num_keys
        self.degree = degree
        self.normalize = normalize
        self.query_norm = query_norm
        self.iterations = iterations
        self.num_samples = num_samples
        generator = torch.Generator().manual_seed(seed)
        priority = [torch.randperm(max_length, generator=generator, device="cpu") for _ in range(num_heads)]
        self.priority: Tensor
        self.register_buffer("priority", torch.stack(priority)[None])

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every key in U."""
        return {"num_keys": length}

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """Polynomial attention of the same degree and normalization, in float64."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return dense(q.double(), k.double(), v.double(), self.degree, 0, self.normalize, **masks)

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"] | None:
        """Mass outside U times the diameter of the values and the zero of the sink; None with `num_samples`.

        The target is (1 - delta_i) a + delta_i c with a the mean over U and the sink, which is the output, and c one
        over the rest. From n x m matrices: for analysis.
        """
        if self.num_samples > 0:
            return None
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            k, v = torch.where(real, k, 0), torch.where(real, v, 0)
        x, y = scaled(q.double(), self.normalize), scaled(k.double(), self.normalize)
        power = kernel_values(x, y, self.degree, **masks)
        outside = torch.where(self.universal_set(k, **masks)[0], 0, power).sum(-1) / (1 + power.sum(-1))
        with_zero = torch.cat([torch.zeros_like(v[:, :, :1]), v], 2)
        padded = None if key_padding_mask is None else torch.cat([key_padding_mask[:, :1] | True, key_padding_mask], 1)
        spread = value_diameter(with_zero, causal=causal, key_padding_mask=padded)
        return outside * (spread[..., 1:] if causal else spread)

    def scores(
        self, k: Float[Tensor, "b h m d"], *, causal: bool, key_padding_mask: Bool[Tensor, "b m"] | None
    ) -> Float[Tensor, "b h m"]:
        """The bounds a_j in float64, -inf for padding. No gradient."""
        y = scaled(k.detach().double(), self.normalize)
        # y is d^{-1/4} k and meets d^{-1/4} q, whose squared length is at most 1/ridge.
        d = k.shape[-1]
        ridge = d**-0.5 if self.normalize else d**0.5 / self.query_norm**2
        if causal:
            found = online_sensitivity_bounds(y, self.degree, ridge)
        else:
            found = sensitivity_bounds(y, self.degree, ridge, self.iterations)
        return found if key_padding_mask is None else found.masked_fill(~key_padding_mask[:, None], -torch.inf)

    def universal_set(
        self,
        k: Float[Tensor, "b h m d"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> tuple[Bool[Tensor, "b h #m m"], Float[Tensor, "b h #m"]]:
        """Which keys are in U (of every row, if causal), and eps: no query within `query_norm` gives any other visible
        key more weight. Materialized: for analysis."""
        scores = self.scores(k, causal=causal, key_padding_mask=key_padding_mask)[:, :, None]
        if causal:
            future = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).triu(1)
            scores = scores.expand(-1, -1, k.shape[2], -1).masked_fill(future, -torch.inf)
        best = top_indices(scores, min(self.num_keys, k.shape[2]))
        inside = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & (scores > -torch.inf)
        return inside, scores.masked_fill(inside, -torch.inf).amax(-1).clamp(0, 1)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        if causal and self.num_samples > 0:
            raise ValueError(f"`num_samples`={self.num_samples} is for bidirectional attention; use 0 for causal")
        x, y = scaled(q, self.normalize), scaled(k, self.normalize)
        if self.num_keys >= k.shape[2]:
            return streamed(x, y, v, self.degree, 0, causal=causal, key_padding_mask=key_padding_mask)
        scores = self.scores(k, causal=causal, key_padding_mask=key_padding_mask)
        if causal:
            return causal_levattention(x, y, v, scores, self.num_keys, self.degree)
        best = top_indices(scores, self.num_keys)
        count = (scores.gather(-1, best) > -torch.inf).to(x.dtype)
        keys, values = take_rows(y, best), take_rows(v, best)
        if self.num_samples > 0:
            sample, count = self._tail(best, count, k, key_padding_mask)
            keys = torch.cat([keys, take_rows(y, sample)], 2)
            values = torch.cat([values, torch.zeros_like(take_rows(v, sample))], 2)
        return rows(x, keys, values, self.degree, 0, count[:, :, None])

    def _tail(self, best: Tensor, count: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sampled keys, and how many keys each of U and of the sample stands for: none, for one that is in U."""
        m = k.shape[2]
        if m > self.priority.shape[-1]:
            raise ValueError(f"length {m} is beyond `max_length`={self.priority.shape[-1]}: build with a larger one")
        mask = None if key_padding_mask is None else key_padding_mask[:, None]
        # The ranks of a random order, cut to the length: still a uniformly random order.
        sample, log_weight = uniform_sample(self.priority[..., :m], self.num_samples, mask, k)
        inside = torch.zeros_like(k[..., 0], dtype=torch.bool).scatter(-1, best, True).gather(-1, sample)
        return sample, torch.cat([count, log_weight.exp().masked_fill(inside, 0)], -1)
