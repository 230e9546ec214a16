"""BigBird: every block of rows sees the blocks beside it, a few global blocks and a few random ones.

With blocks of s positions, I(i) = floor(i / s), g global blocks at the start and T blocks that hold real tokens,

    out_i = sum_{j in P_i} exp(s' <q_i, k_j>) v_j / sum_{j in P_i} exp(s' <q_i, k_j>),   s' = 1/sqrt(d),
    P_i = {j : I(i) < g or I(j) < g or |I(i) - I(j)| <= 1 or I(j) in R_{I(i)}},   causal P_i = {such j <= i},

where R_I is a uniform subset of size r, or all if they are fewer, of the blocks that are in none of the other sets: of
those in g .. T - 1 bidirectional, of those in g .. I - 2 causal, so that a choice never looks at what comes later.
Every head has its own draws. Time O(n s (3 + g + r) d), memory O(n (3 + r) d). Equals softmax attention with one block
(s >= n), in both modes.

Disjoint parts, merged by their log-sum-exp: the own block; the gathered neighbors and random blocks; the global
blocks. Rows of global blocks are dense. T is the example's own: padding belongs on the right.

Source: "Big Bird: Transformers for Longer Sequences" (Zaheer et al., 2020), https://arxiv.org/abs/2007.14062.
Departures: global blocks are the first ones, not the first and the last, which would move with the length; r random
blocks beside the others, never one of them; a causal form, which the paper (encoder only) does not have.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.band import hidden_keys
from attnlens.linalg.blocks import fold, take_rows, unfold
from attnlens.linalg.dropped_mass import dropped_mass_bound
from attnlens.linalg.partial import merge, partial_attention


def floyd_subset(draws: Int[Tensor, "*k r"], count: Int[Tensor, "*k"]) -> Int[Tensor, "*k r"]:
    """r of 0..count-1 without replacement from r independent draws; all of them, and -1 for the rest, if r > count.

    For j = count - r .. count - 1: a number in 0..j, or j itself if that number is taken ("A sample of brilliance",
    Bentley, Floyd, 1987): uniform over subsets, without a permutation of all blocks.
    """
    r = draws.shape[-1]
    chosen = torch.full_like(draws, -1).expand(*count.shape, r)
    for step in range(r):
        last = count - r + step
        number = draws[..., step] % (last + 1).clamp_min(1)
        number = torch.where((chosen == number[..., None]).any(-1), last, number)
        number = torch.where(last < 0, -1, number)
        chosen = torch.cat([chosen[..., :step], number[..., None], chosen[..., step + 1 :]], -1)
    return chosen


def listed_blocks(
    draws: Int[Tensor, "h t r"], num_global: int, num_real: Int[Tensor, "b"], *, causal: bool
) -> Int[Tensor, "b h u m"]:
    """The neighbors and the random blocks of every block from `num_global` on; -1 where there is none.

    m = 1 + r when causal, 2 + r else. `num_real` counts the blocks up to the last real token of each example.
    """
    h, t, r = draws.shape
    g, b = num_global, num_real.shape[0]
    block = torch.arange(g, t, device=draws.device)
    before = (block - 1 - g).clamp_min(0).expand(b, h, -1)
    after = torch.zeros_like(before) if causal else (num_real[:, None, None] - 2 - block).clamp_min(0).expand(b, h, -1)
    rank = floyd_subset(draws[:, g:].expand(b, h, t - g, r), before + after)
    own, low = block[:, None], before[..., None]
    random = torch.where(rank < low, g + rank, own + 2 + rank - low)
    random = torch.where(rank < 0, -1, random)
    previous = torch.where(block > g, block - 1, -1)
    following = torch.where(block + 1 < t, block + 1, -1)
    beside = previous[:, None] if causal else torch.stack([previous, following], -1)
    return torch.cat([beside.expand(b, h, -1, -1), random], -1)


def bigbird_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    draws: Int[Tensor, "h t r"],
    block_size: int,
    num_global: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Attention over the blocks of the pattern; the first `num_global` blocks of rows are dense."""
    b, n, mask = q.shape[0], q.shape[2], key_padding_mask
    lead = num_global * block_size
    if max(lead, block_size) >= n:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=mask)[0]
    position = torch.arange(1, n + 1, device=q.device)
    length = position[-1:].expand(b) if mask is None else (mask * position).amax(-1)
    blocks = listed_blocks(draws, num_global, (length + block_size - 1) // block_size, causal=causal)
    hidden = hidden_keys(mask, n, block_size, q)
    near = _near_and_random(q, k, v, blocks, block_size, hidden, causal=causal)
    if num_global == 0:
        return near[0]
    first = None if mask is None else mask[:, :lead]
    to_global = partial_attention(q[:, :, lead:], k[:, :, :lead], v[:, :, :lead], key_padding_mask=first)
    reach = lead if causal else n
    seen = None if mask is None else mask[:, :reach]
    from_global = partial_attention(
        q[:, :, :lead], k[:, :, :reach], v[:, :, :reach], causal=causal, key_padding_mask=seen
    )[0]
    return torch.cat([from_global, merge(near, to_global)[0]], 2)


def _near_and_random(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    blocks: Int[Tensor, "b h u m"],
    size: int,
    hidden: Float[Tensor, "#b t s"] | None,
    *,
    causal: bool,
) -> tuple[Float[Tensor, "b h r dv"], Float[Tensor, "b h r"]]:
    """The last u blocks of rows over their own block and over the listed ones."""
    (b, h, n), u = q.shape[:3], blocks.shape[2]
    q, k, v = fold(q, size), fold(k, size), fold(v, size)
    g = q.shape[1] - u
    taken = blocks.clamp_min(0)
    keys, values = (take_rows(x.reshape(b, h, g + u, -1), taken).reshape(b * h, u, -1, x.shape[-1]) for x in (k, v))
    bias = torch.zeros(*blocks.shape, 1, dtype=q.dtype, device=q.device).masked_fill(blocks[..., None] < 0, -torch.inf)
    own = None
    if hidden is not None:
        hidden = hidden.expand(b, -1, -1)[:, None].expand(-1, h, -1, -1)
        bias = bias + take_rows(hidden, taken)
        own = hidden[:, :, g:].flatten(0, 1)[:, :, None]
    bias = bias.expand(-1, -1, -1, -1, size).reshape(b * h, u, 1, -1)
    own = partial_attention(q[:, g:], k[:, g:], v[:, g:], causal=causal, bias=own)
    out, lse = merge(own, partial_attention(q[:, g:], keys, values, bias=bias))
    rows = n - g * size
    return unfold(out, h, rows), unfold(lse[..., None], h, rows)[..., 0]


class BigBird(AbstractAttention):
    """Window, global and random blocks.

    Args:
        block_size: positions a block, at least 1.
        num_global: blocks at the start that see all and are seen by all, at least 0.
        num_random: random blocks a block of rows sees, at least 0.
        num_heads: each draws its own blocks.
        max_length: the longest input.
        seed: of the draws.
    """

    family = "sparse"
    budget = "block_size"
    self_attention = True
    row_stochastic = True

    def __init__(
        self, block_size: int, num_heads: int, max_length: int, seed: int, num_global: int = 1, num_random: int = 3
    ) -> None:
        super().__init__()
        if block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {block_size}")
        for name, value in (("num_global", num_global), ("num_random", num_random)):
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}")
        self.block_size, self.num_global, self.max_length = block_size, num_global, max_length
        generator = torch.Generator().manual_seed(seed)
        shape = (num_heads, -(-max_length // block_size), num_random)
        self.draws: Tensor
        # Integers, which a change of the module's precision leaves alone.
        self.register_buffer("draws", torch.randint(2**62, shape, generator=generator, device="cpu"))

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With one block."""
        return {"block_size": length}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """Dropped mass times the diameter of the values; at q = 0 the matrix is positive on what a row visits."""
        visited = self.matrix(torch.zeros_like(q), k, causal=causal, key_padding_mask=key_padding_mask) > 0
        return dropped_mass_bound(visited, q, k, v, causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        n = k.shape[2]
        if n > self.max_length:
            raise ValueError(f"length {n} is beyond `max_length`={self.max_length}: build with a larger one")
        draws = self.draws[:, : -(-n // self.block_size)]
        return bigbird_attention(
            q, k, v, draws, self.block_size, self.num_global, causal=causal, key_padding_mask=key_padding_mask
        )
