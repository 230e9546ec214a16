"""HyperAttention: hashed blocks exactly, the rest from a uniform sample of keys.

Keys sorted by their hyperplane code are cut into blocks of b. A query attends exactly to one block B_i, and estimates
the rest from a uniform sample S of b keys, each of which stands for c / |S| of the c keys that it was drawn from:

    out_i = sum_j A~_ij v_j / sum_j A~_ij,   A~_ij = e^{s <q_i, k_j>} (1[j in B_i] + (c / |S|) 1[j in S, j not in B_i]).

Given the blocks, A~ and its row sums are unbiased; `out` is a ratio of estimates, with a bias of O(1/b). Codes and
samples are constants for the gradient.

Bidirectional (`equal_blocks`): queries are sorted by code too, and query block g gets key block g. Time
O(n (b d + log n)), memory O(n d). Equals softmax attention when b >= n. `own_blocks` places a query by its own code
instead, whatever the number of queries.

Causal (`dyadic_cells`): positions are cut into leaves of 4 b, leaves are paired into cells of 8 b, these into cells of
16 b, and so on. A row attends exactly to the past of its leaf and, for every cell in whose right half it lies, to the
left half by block and sample. A left half is wholly past; in it keys alone are sorted, and a query goes to the block in
whose interval of codes its own code falls. Cells, codes and draws belong to absolute positions, so that no output
depends on later tokens or on their number. Time O(n (b d + log n) log(n / b)), memory O(n d log(n / b)). Equals softmax
attention when 4 b >= n.

Source: "HyperAttention: Long-context Attention in Near-Linear Time" (Han, Jayaram, Karbasi, Mirrokni, Woodruff,
Zandieh, 2023), https://arxiv.org/abs/2310.05869. Departures: the sample is drawn without replacement and is as large as
a block, so that one argument is the budget; blocks need not divide the length. The paper's causal recursion halves the
sequence and sorts queries, and both let the future in: blocks depend on later queries, halves on the length. The
survey's text omits the weight c / |S|, without which row sums come out far too small.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.hashed_blocks import dyadic_cells, equal_blocks, estimated_matrix, own_blocks
from attnlens.linalg.sampling import sampled_rest, uniform_sample


class HyperAttention(AbstractAttention):
    """Attention over hashed blocks and a uniform sample.

    Args:
        block_size: keys of a block and of the sample, at least 1.
        num_planes: bits of the code, 1 to 30. With more codes than tokens, matching queries and keys part at the ends
            of equal blocks: the paper's 7 bits are for thousands of tokens.
        head_dim: of queries and keys.
        num_heads: each has its own planes and priorities.
        max_length: the longest input.
        seed: of the planes and the priorities.
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
        sort_queries: bool = True,
    ) -> None:
        super().__init__()
        if block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {block_size}")
        if not 1 <= num_planes <= 30:
            raise ValueError(f"`num_planes` must be 1 to 30, got {num_planes}: there are 2^num_planes codes")
        self.block_size, self.sort_queries = block_size, sort_queries
        # What holds for the class holds for queries that are sorted.
        self.self_attention = sort_queries  # pyright: ignore[reportAttributeAccessIssue]
        self.rows_independent = not sort_queries  # pyright: ignore[reportAttributeAccessIssue]
        generator = torch.Generator().manual_seed(seed)
        self.planes: Tensor
        self.priority: Tensor
        self.register_buffer("planes", torch.randn(num_heads, head_dim, num_planes, generator=generator, device="cpu"))
        # Integers, which keep their order when the module is cast to half precision.
        order = torch.rand(num_heads, max_length, generator=generator, device="cpu").argsort(-1)
        self.register_buffer("priority", order)

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
        n = k.shape[2]
        if n > self.priority.shape[1]:
            raise ValueError(f"length {n} is beyond `max_length`={self.priority.shape[1]}: build with a larger one")
        bidirectional = equal_blocks if self.sort_queries else own_blocks
        form = dyadic_cells if causal else bidirectional
        rest = partial(sampled_rest, sampler=uniform_sample, size=self.block_size)
        draws = self.planes, (self.priority[:, :n],), self.block_size, rest
        return form(q, k, v, *draws, key_padding_mask=key_padding_mask)

    def kernel(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], *, causal: bool = False
    ) -> Float[Tensor, "b h n n"]:
        """The matrix A~ before it is normalized: an unbiased estimate of `kernel_target`."""
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
