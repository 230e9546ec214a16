"""HyperAttention: hashed blocks exactly, the rest from a uniform sample of keys.

Keys sorted by their hyperplane code are cut into blocks of b. A query attends exactly to one block B_i, and estimates
the rest from a uniform sample S of b keys, each of which stands for c / |S| of the c keys that it was drawn from:

    out_i = sum_j A~_ij v_j / sum_j A~_ij,   A~_ij = e^{s <q_i, k_j>} (1[j in B_i] + (c / |S|) 1[j in S, j not in B_i]).

Given the blocks, A~ and its row sums are unbiased; `out` is a ratio of estimates, with a bias of O(1/b). Codes and
samples are constants for the gradient.

Bidirectional (`equal_blocks`): queries are sorted by code too, and query block g gets key block g. Time
O(n (b d + log n)), memory O(n d). Equals softmax attention when b >= n.

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

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import balanced_groups, fold, inverse, take_rows, tiles, unfold
from attnlens.linalg.hashing import hyperplane_code
from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.sampling import blocks_and_sample, uniform_sample

LEAF_BLOCKS = 4  # block and sample would fill a half of 2 b keys: the smallest worth sampling has 4 b


def equal_blocks(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    planes: Float[Tensor, "h d p"],
    priority: Int[Tensor, "h n"],
    block_size: int,
    *,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """The bidirectional form: `out` and the log of the estimated row sums; padded queries are empty rows."""
    b, h, n = q.shape[:3]
    if block_size >= n:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)
    of_queries = balanced_groups(hyperplane_code(q, planes), block_size, key_padding_mask)
    of_keys = balanced_groups(hyperplane_code(k, planes), block_size, key_padding_mask)
    groups, slots = of_keys.members.shape[-2:]
    mask = None if key_padding_mask is None else key_padding_mask[:, None]
    out, lse = blocks_and_sample(
        take_rows(q, of_queries.members),
        k,
        v,
        of_keys.members,
        of_keys.filled,
        torch.arange(groups, device=q.device).expand(b, h, groups),
        of_keys.place // slots,
        *uniform_sample(priority[None], block_size, mask, k),
    )
    out, lse = take_rows(out, of_queries.place), lse.gather(-1, of_queries.place)
    if mask is None:
        return out, lse
    return torch.where(mask[..., None], out, 0), torch.where(mask, lse, -torch.inf)


def dyadic_cells(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    planes: Float[Tensor, "h d p"],
    priority: Int[Tensor, "h n"],
    block_size: int,
    *,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """The causal form: `out` and the log of the estimated row sums."""
    n, size = q.shape[2], LEAF_BLOCKS * block_size
    if size >= n:
        return partial_attention(q, k, v, causal=True, key_padding_mask=key_padding_mask)
    mask = None if key_padding_mask is None else key_padding_mask[:, None]
    parts = [_leaves(q, k, v, size, mask)]
    codes = hyperplane_code(q, planes), hyperplane_code(k, planes)
    while size < n:
        parts.append(_siblings(q, k, v, codes, priority[None], size, block_size, mask))
        size *= 2
    return merge(*parts)


def _leaves(
    q: Tensor, k: Tensor, v: Tensor, size: int, mask: Bool[Tensor, "b 1 n"] | None
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Exact causal attention inside blocks of `size` positions."""
    h, n = q.shape[1:3]
    bias = None
    if mask is not None:
        hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        bias = fold(hidden.expand(-1, h, -1)[..., None], size).mT
    out, lse = partial_attention(fold(q, size), fold(k, size), fold(v, size), causal=True, bias=bias)
    return unfold(out, h, n), unfold(lse[..., None], h, n)[..., 0]


def _siblings(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    codes: tuple[Int[Tensor, "b h n"], Int[Tensor, "b h n"]],
    priority: Int[Tensor, "1 h n"],
    size: int,
    block_size: int,
    mask: Bool[Tensor, "b 1 n"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Rows of every right cell of `size` positions over the cell left of it; other rows are empty."""
    h, n = q.shape[1:3]
    pairs = -(-(n - size) // (2 * size))
    rows = size if pairs > 1 else min(size, n - size)
    width = size + rows

    def cells(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, max(0, pairs * width - n)))
        return x[:, :, : pairs * width].unflatten(2, (pairs, width))

    def past(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return cells(x)[:, :, :, :size].flatten(1, 2)

    def now(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return cells(x)[:, :, :, size:].flatten(1, 2)

    real = None if mask is None else past(mask.expand(-1, h, -1))
    out, lse = _cell(now(q), now(codes[0]), past(k), past(v), past(codes[1]), past(priority), block_size, real)
    out = F.pad(out.unflatten(1, (h, pairs)), (0, 0, size, 0)).flatten(2, 3)
    lse = F.pad(lse.unflatten(1, (h, pairs)), (size, 0), value=-torch.inf).flatten(2, 3)
    missing = max(0, n - pairs * width)
    return F.pad(out, (0, 0, 0, missing))[:, :, :n], F.pad(lse, (0, missing), value=-torch.inf)[:, :, :n]


def _cell(
    q: Float[Tensor, "b h n d"],
    q_code: Int[Tensor, "b h n"],
    k: Float[Tensor, "b h c d"],
    v: Float[Tensor, "b h c dv"],
    k_code: Int[Tensor, "b h c"],
    priority: Int[Tensor, "1 h c"],
    block_size: int,
    mask: Bool[Tensor, "b h c"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Each query over the block of sorted keys where its own code falls and over a sample of the other blocks."""
    c = k_code.shape[-1]
    count = torch.full_like(k_code[..., :1], c) if mask is None else mask.sum(-1, keepdim=True)
    if mask is not None:
        k_code = k_code.masked_fill(~mask, torch.iinfo(k_code.dtype).max)
    k_code, order = k_code.sort(dim=-1, stable=True)
    # Among keys of its own code the query takes the middle one, so that a crowded code does not crowd one block.
    below, above = (torch.searchsorted(k_code, q_code.contiguous(), right=side) for side in (False, True))
    rank = ((below + above) // 2).minimum(count - 1).clamp_min(0)
    cut = tiles(rank // block_size, c // block_size, max(1, block_size // 2))
    slot = cut.block[..., None] * block_size + torch.arange(block_size, device=q.device)
    out, lse = blocks_and_sample(
        take_rows(q, cut.members),
        k,
        v,
        order.gather(-1, slot.flatten(2)).view(slot.shape),
        None if mask is None else slot < count[..., None],
        cut.block,
        inverse(order) // block_size,
        *uniform_sample(priority, block_size, mask, k),
    )
    return take_rows(out, cut.place), lse.gather(-1, cut.place)


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
    """

    family = "sampling"
    budget = "block_size"
    self_attention = True
    row_stochastic = True
    rows_independent = False
    unbiased = True

    def __init__(
        self, block_size: int, num_planes: int, head_dim: int, num_heads: int, max_length: int, seed: int
    ) -> None:
        super().__init__()
        if block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {block_size}")
        if not 1 <= num_planes <= 30:
            raise ValueError(f"`num_planes` must be 1 to 30, got {num_planes}: there are 2^num_planes codes")
        self.block_size = block_size
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
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b n"] | None,
    ) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
        """The output and the log of the estimated row sums."""
        n = q.shape[2]
        if n > self.priority.shape[1]:
            raise ValueError(f"length {n} is beyond `max_length`={self.priority.shape[1]}: build with a larger one")
        form = dyadic_cells if causal else equal_blocks
        draws = self.planes, self.priority[:, :n], self.block_size
        return form(q, k, v, *draws, key_padding_mask=key_padding_mask)

    def kernel(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], *, causal: bool = False
    ) -> Float[Tensor, "b h n n"]:
        """The matrix A~ before it is normalized: an unbiased estimate of `kernel_target`."""
        eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        out, lse = self.estimate(q, k, eye, causal=causal, key_padding_mask=None)
        return out * lse.exp()[..., None]

    def kernel_target(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], *, causal: bool = False
    ) -> Float[Tensor, "b h n n"]:
        """exp(<q_i, k_j> / sqrt(d)) of the visible pairs."""
        kernel = (q @ k.mT * q.shape[-1] ** -0.5).exp()
        return kernel.tril() if causal else kernel

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
