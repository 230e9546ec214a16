"""MRA: attention at two resolutions, whole blocks of keys by their mean, and the blocks that matter key by key.

With blocks of b tokens, mean key c_J, mean value u_J, count N_J of each, and for every block I of queries a set T_I of
at most r blocks, its own among them, those of the largest coarse mass N_J e^{s <q_I, c_J>} for its mean query q_I:

    out_i = (sum_{j in T_I} e^{s <q_i, k_j>} v_j + sum_{J not in T_I} N_J e^{s <q_i, c_J> + x_iJ} u_J)
          / (sum_{j in T_I} e^{s <q_i, k_j>}     + sum_{J not in T_I} N_J e^{s <q_i, c_J> + x_iJ}),    s = 1/sqrt(d),

x = 0, or with `variance` s^2 sum_a q_a^2 Var_a(J) / 2. Causal: J < I besides the triangle of the own block, and T_I is
chosen by the mean query of the block before, the last one that is complete when the first row of block I is computed.

Time O(n (n / b + r b) d), that is O(n^1.5 d) at b = sqrt(n); memory O(n (r d + n / b^2)), the gathered keys of 1024
rows at a time where no gradient is asked for. Equals softmax attention when r b >= n, or b >= n.

The error is bounded in `linalg.cell_bound`: of the masses second order, of the values first order in the range of the
scores within a block. The choice is constant for the gradient.

Source: "Multi Resolution Analysis (MRA) for Approximate Self-Attention" (Zeng, Pal, Kline, Fung, Singh, 2022),
https://arxiv.org/abs/2207.10284, the form with two resolutions. Departures: r blocks for every block of queries, in the
paper the largest in the whole matrix, which is not causal and leaves rows of the same cost; a query weighs a coarse
block by its own score, in the paper all queries of a block share that of their mean; the normalizer counts N_J.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import fold, take_rows, unfold
from attnlens.linalg.cell_bound import Points, cell_bound
from attnlens.linalg.cells import Cells, Refinement, leaves, merge_points, point_exponents, squared
from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.selected import top_indices

ROWS = 1024


def chosen_blocks(
    q: Float[Tensor, "bh t b d"],
    tokens: Cells,
    cells: Cells,
    num_blocks: int,
    *,
    causal: bool,
) -> tuple[Int[Tensor, "bh t r"], Bool[Tensor, "bh t r"]]:
    """The blocks that every block of queries refines, and which slots hold one; the own one is not among them.

    Of equal scores the first block is taken. No gradient.
    """
    t, scale = q.shape[1], q.shape[-1] ** -0.5
    mean = q.detach().sum(2) / tokens.num_tokens.sum(-1, keepdim=True).clamp_min(1)
    if causal:
        mean = torch.cat([mean[:, :1], mean[:, :-1]], 1)
    scores = mean @ cells.keys[:, :, 0].detach().mT * scale + cells.num_tokens[:, None, :, 0].log()
    block = torch.arange(t, device=q.device)
    hidden = (block >= block[:, None]) if causal else (block == block[:, None])
    scores = scores.masked_fill(hidden, -torch.inf)
    if num_blocks == 1:
        index = torch.zeros(*scores.shape[:2], 0, dtype=torch.long, device=q.device)
    else:
        index = top_indices(scores, min(num_blocks - 1, t))
    # Ties at -inf name hidden blocks, and so may the scores of a NaN query, which have no order.
    return index, (scores.gather(-1, index) != -torch.inf) & ~hidden.expand(scores.shape).gather(-1, index)


def mra_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    block_size: int,
    num_blocks: int,
    variance: bool = False,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Own blocks, chosen blocks and all other blocks, merged by their log-sum-exp; `ROWS` rows at a time."""
    h, n = q.shape[1:3]
    if block_size * num_blocks >= n:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
    tokens, cells = two_levels(k, v, block_size, variance, key_padding_mask)
    rows = fold(q, block_size)
    index, filled = chosen_blocks(rows, tokens, cells, num_blocks, causal=causal)
    coarse = coarse_bias(cells, index, filled, causal)
    own = partial_attention(rows, tokens.keys, tokens.values, causal=causal, bias=tokens.num_tokens.log()[:, :, None])
    outs, step = [], max(1, ROWS // block_size)
    for start in range(0, rows.shape[1], step):
        part = slice(start, start + step)
        refined = _refined(rows[:, part], tokens, index[:, part], filled[:, part])
        rest = _coarse(rows[:, part], cells, coarse[:, part])
        outs.append(merge((own[0][:, part], own[1][:, part]), refined, rest)[0])
    return unfold(torch.cat(outs, 1), h, n)


def two_levels(
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    block_size: int,
    variance: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Cells, Cells]:
    """The tokens of every block, and every block as one point."""
    tokens = leaves(k, v, block_size, Refinement(block_size), key_padding_mask)
    return tokens, merge_points(tokens, block_size, Refinement(1, variance))


def coarse_bias(
    cells: Cells, index: Int[Tensor, "bh t r"], filled: Bool[Tensor, "bh t r"], causal: bool
) -> Float[Tensor, "bh t t"]:
    """log N_J where block I of queries sees block J by its mean, else -inf."""
    t = index.shape[1]
    chosen = torch.zeros(*index.shape[:2], t, dtype=torch.bool, device=index.device).scatter(-1, index, filled)
    block = torch.arange(t, device=index.device)
    hidden = chosen | ((block >= block[:, None]) if causal else (block == block[:, None]))
    return cells.num_tokens[:, None, :, 0].log().masked_fill(hidden, -torch.inf)


def _refined(
    rows: Float[Tensor, "bh c b d"], tokens: Cells, index: Int[Tensor, "bh c r"], filled: Bool[Tensor, "bh c r"]
) -> tuple[Float[Tensor, "bh c b dv"], Float[Tensor, "bh c b"]]:
    """Blocks of queries over the tokens of the blocks chosen for each."""
    size = rows.shape[2]
    keys, values = (
        take_rows(x.flatten(2)[None], index[None])[0].unflatten(3, (size, -1)).flatten(2, 3)
        for x in (tokens.keys, tokens.values)
    )
    count = tokens.num_tokens.expand(rows.shape[0], -1, -1)
    bias = take_rows(count[None], index[None])[0].log().masked_fill(~filled[..., None], -torch.inf)
    return partial_attention(rows, keys, values, bias=bias.flatten(2)[:, :, None])


def _coarse(
    rows: Float[Tensor, "bh c b d"], cells: Cells, bias: Float[Tensor, "bh c t"]
) -> tuple[Float[Tensor, "bh c b dv"], Float[Tensor, "bh c b"]]:
    """Blocks of queries over block means."""
    scale, keys = rows.shape[-1] ** -0.5, cells.keys
    if cells.variance is not None:
        rows = torch.cat([rows, squared(rows) * (scale / 2)], -1)
        keys = torch.cat([keys, cells.variance], -1)
    # Expanded, not copied: every block of queries reads the same means.
    keys, values = (x.transpose(1, 2).expand(-1, rows.shape[1], -1, -1) for x in (keys, cells.values))
    return partial_attention(rows, keys, values, bias=bias[:, :, None], scale=scale)


class Mra(AbstractAttention):
    """Block means everywhere, and single keys in the blocks of the largest coarse mass.

    Args:
        num_blocks: blocks that a block of queries sees key by key, its own included, at least 1.
        block_size: tokens of a block, at least 1.
        variance: whether the mass of a coarse block is corrected for the variance of its keys.
    """

    family = "hierarchical"
    budget = "num_blocks"
    self_attention = True
    row_stochastic = True
    rows_independent = False

    def __init__(self, num_blocks: int, block_size: int, variance: bool = False) -> None:
        super().__init__()
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.num_blocks, self.block_size, self.variance = num_blocks, block_size, variance

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every block refined."""
        return {"num_blocks": length}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """The bound of `cell_bound`, at the blocks that are chosen."""
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            q, k, v = (torch.where(real, x, 0) for x in (q, k, v))
        (b, h, n), size = q.shape[:3], self.block_size
        tokens, cells = two_levels(k, v, size, self.variance, key_padding_mask)
        index, filled = chosen_blocks(fold(q, size), tokens, cells, self.num_blocks, causal=causal)
        visible = coarse_bias(cells, index, filled, causal).unflatten(0, (b, h)) > -torch.inf
        visible = visible.repeat_interleave(size, 2)[:, :, :n]
        if size * self.num_blocks >= n:
            visible = torch.zeros_like(visible)
        owner = (torch.arange(n, device=k.device) // size).expand(b, h, n)
        exponent = point_exponents(q, cells)
        parts = [Points(owner, visible, exponent, torch.zeros_like(exponent[:, :, 0]))]
        return cell_bound(parts, q, k, v, causal=causal, key_padding_mask=key_padding_mask)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        sizes = self.block_size, self.num_blocks, self.variance
        return mra_attention(q, k, v, *sizes, causal=causal, key_padding_mask=key_padding_mask)
