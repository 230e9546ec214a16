"""KDEformer: hashed blocks exactly, the rest from keys sampled in proportion to the length of their values.

Keys sorted by their hyperplane code are cut into blocks of b. A query attends exactly to one block B_i and estimates
the rest from a sample S of m keys, drawn with p_j = (|v_j| / sum_l |v_l| + 1 / c) / 2 among the c keys at hand:

    out_i = sum_j A~_ij v_j / sum_j A~_ij,   A~_ij = e^{s <q_i, k_j>} (1[j in B_i] + w_j 1[j in S, j not in B_i]),
    w_j = 1 / Pr[j in S], close to 1 / (m p_j).

Given the blocks, A~ and its row sums are unbiased, with the variance sum_{j not in B_i} Var(w_j) A_ij^2 for a row sum;
`out` is a ratio of estimates, hence biased. Bidirectional (`equal_blocks`): queries are sorted by code too, time
O(n ((b + m) d + log n)), memory O(n d (1 + m / b)). Causal (`dyadic_cells`): a row attends exactly to its leaf of 4 b
positions and to wholly past cells by block and sample; a factor log(n / b) more. Equals softmax attention when b >= n.

The theory, in `linalg.kernel_density`, samples by column norms of P and divides by row sums that a kernel density
estimate finds up to 1 +- eps. That estimate costs n^{1.17} in theory; the authors' code, and this one, take the values
alone for p and the same sample for the row sums, for which no eps is known: their error is measured, not bounded.

Source: "KDEformer: Accelerating Transformers via Kernel Density Estimation" (Zandieh, Han, Daliri, Karbasi, 2023),
https://arxiv.org/abs/2302.02451. Departures: p does not change when all values are multiplied by a number (the code
compares |v_j| / |V|^2 with 1 / n); keys are drawn without replacement, by a race (`linalg.sampling`), so that draws
belong to positions and m >= n has no error; everything is a log-sum-exp, where the code's exponentials overflow at
logits of 89 in float32; the causal form.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.hashed_blocks import dyadic_cells, equal_blocks, estimated_matrix, own_blocks
from attnlens.linalg.sampling import race_sample, sampled_rest, value_probability


def sample_by_values(
    waiting: Float[Tensor, "1 h c"],
    size: int,
    mask: Bool[Tensor, "b #h c"] | None,
    v: Float[Tensor, "b h c dv"],
) -> tuple[Int[Tensor, "b h l"], Float[Tensor, "b h l"]]:
    """S and log w_j, from one exponential draw a key."""
    return race_sample(waiting, size, mask, value_probability(v, mask))


class KDEformer(AbstractAttention):
    """Attention over hashed blocks and a sample by the length of the values.

    Args:
        block_size: keys of a block, at least 1.
        num_planes: bits of the code, 1 to 30; the paper's 7 are for thousands of tokens.
        head_dim: of queries and keys.
        num_heads: each has its own planes and draws.
        max_length: the longest input.
        seed: of the planes and the draws.
        num_samples: keys of the sample, at least 1; by default as many as a block has.
        sort_queries: whether queries, too, are cut into equal blocks when not causal. Without it, a query is placed by
            its own code as in the causal form: rows are independent and there may be more queries than keys.
    """

    family = "sampling"
    budget = "block_size"
    self_attention = True
    row_stochastic = True
    rows_independent = False
    unbiased = True

    def __init__(
        self,
        block_size: int,
        num_planes: int,
        head_dim: int,
        num_heads: int,
        max_length: int,
        seed: int,
        num_samples: int | None = None,
        sort_queries: bool = True,
    ) -> None:
        super().__init__()
        if block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {block_size}")
        if not 1 <= num_planes <= 30:
            raise ValueError(f"`num_planes` must be 1 to 30, got {num_planes}: there are 2^num_planes codes")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, got {num_samples}; None takes `block_size`")
        self.block_size, self.sort_queries = block_size, sort_queries
        self.num_samples = block_size if num_samples is None else num_samples
        # What holds for the class holds for queries that are sorted.
        self.self_attention = sort_queries  # pyright: ignore[reportAttributeAccessIssue]
        self.rows_independent = not sort_queries  # pyright: ignore[reportAttributeAccessIssue]
        generator = torch.Generator().manual_seed(seed)
        self.planes: Tensor
        self.waiting: Tensor
        self.register_buffer("planes", torch.randn(num_heads, head_dim, num_planes, generator=generator, device="cpu"))
        waiting = torch.empty(num_heads, max_length, device="cpu").exponential_(generator=generator)
        self.register_buffer("waiting", waiting.clamp_min(torch.finfo(waiting.dtype).tiny))

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With one block."""
        return {"block_size": length}

    def estimate(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
        """The output and the log of the estimated row sums."""
        m = k.shape[2]
        if m > self.waiting.shape[1]:
            raise ValueError(f"length {m} is beyond `max_length`={self.waiting.shape[1]}: build with a larger one")
        bidirectional = equal_blocks if self.sort_queries else own_blocks
        form = dyadic_cells if causal else bidirectional
        rest = partial(sampled_rest, sampler=sample_by_values, size=self.num_samples)
        draws = self.planes, (self.waiting[:, :m],), self.block_size, rest
        return form(q, k, v, *draws, key_padding_mask=key_padding_mask)

    def kernel(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], *, causal: bool = False
    ) -> Float[Tensor, "b h n n"]:
        """The matrix A~ for values of equal length: an unbiased estimate of `kernel_target`."""
        return estimated_matrix(partial(self.estimate, q, causal=causal, key_padding_mask=None), k)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return self.estimate(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
