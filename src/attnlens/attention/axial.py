"""Axial attention: along the rows of a grid, then along its columns, with the same queries and keys.

Token r C + c is the cell (r, c) of a grid with C = `num_columns` and as many rows as the length needs. With
s_ij = <q_i, k_j> / sqrt(d) and N_r the number of real tokens of row r,

    u_(r,c) = sum_c' softmax_c'(s_(r,c),(r,c')) v_(r,c'),
    out_(r,c) = sum_r' softmax_r'(s_(r,c),(r',c) + log N_r') u_(r',c),

that is out = P_col P_row V with two masked softmax matrices. Causal: rows have a mask, and columns are shifted,

    out_(r,c) = w_r u-_(r,c) + sum_{r' < r} w_r' u_(r',c),   w = softmax over r' <= r of s_(r,c),(r',c) + log N_r',

where u- sees its row up to its own cell, N_r tokens, and u, all of it, is read from finished rows only. A token so sees
itself and every token before it, and none after it.

Time O(n (n / C + C) d), least at C = sqrt(n); memory O(n d). Equals softmax attention with one row (C >= n) or one
column (C = 1), causal too, and in between, on a full grid and not causal, for additive logits s_(r,c),(r',c') =
f(r, r') + g(c, c'). Elsewhere it is its own definition, and nothing converges: the error is bounded by how far the
rows' masses are from the column's weights and the rows' patterns from those of the query,

    |out_i - softmax_i| <= diam(V) (TV(W_i, w_i) + sum_r' w_i(r') TV(softmax(s_i,(r',.)), softmax(s_(r',c),(r',.)))),

W_i(r') the softmax mass of row r'. Where the last row is not full, a token whose column ends above it does not see it.

Source: "Axial Attention in Multidimensional Transformers" (Ho, Kalchbrenner, Weissenborn, Salimans, 2019),
https://arxiv.org/abs/1912.12180. Departures: there each axis is a layer with projections of its own and, in the causal
case, context from above enters by a shift and a sum; here both are one operator and the own row is one of the column's
entries. The grid's width is fixed, not both sides: any length works and a prefix of the sequence is one of the grid.
The numbers N_r, equal on a full grid and then without effect, are ours: an entry of a column stands for as many tokens
as its row shows, so that logits of zero give the mean of the values. `count_tokens=False` leaves them out.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.dense import softmax_round_off
from attnlens.linalg.grid import fixed_modes, grid_shape, real_cells, to_grid, to_sequence
from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.selected import value_diameter


def along_columns(
    q: Float[Tensor, "b h r c d"],
    k: Float[Tensor, "b h s c d"],
    v: Float[Tensor, "b h s c dv"],
    real: Bool[Tensor, "#b s c"] | None,
    *,
    causal: bool = False,
    counted: bool = False,
) -> tuple[Float[Tensor, "b h r c dv"], Float[Tensor, "b h r c"]]:
    """Attention within every column and its log-sum-exp, one kernel call with the columns in the batch.

    `counted` adds the log of the number of real cells of its row to the score of a key.
    """
    b, c = q.shape[0], q.shape[3]
    q, k, v = (x.permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (q, k, v))
    mask = bias = None
    if real is not None:
        mask = real.expand(b, -1, -1).mT.flatten(0, 1)
        counts = real.sum(-1).clamp_min(1).to(q.dtype).log()
        bias = counts.expand(b, -1).repeat_interleave(c, 0)[:, None, None] if counted else None
    out, lse = partial_attention(q, k, v, causal=causal, key_padding_mask=mask, bias=bias)
    return out.unflatten(0, (b, c)).permute(0, 2, 3, 1, 4), lse.unflatten(0, (b, c)).permute(0, 2, 3, 1)


def along_rows(
    q: Float[Tensor, "b h r c d"],
    k: Float[Tensor, "b h r c d"],
    v: Float[Tensor, "b h r c dv"],
    real: Bool[Tensor, "#b r c"] | None,
    *,
    causal: bool = False,
) -> Float[Tensor, "b h r c dv"]:
    """Attention within every row: the columns of the grid turned over."""
    q, k, v = (x.transpose(2, 3) for x in (q, k, v))
    out, _ = along_columns(q, k, v, None if real is None else real.mT, causal=causal)
    return out.transpose(2, 3)


def axial_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    num_columns: int,
    count_tokens: bool,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The formulas above."""
    n = q.shape[2]
    shape = grid_shape(n, (num_columns,))
    # What lies behind the last token is hidden by causality already.
    real = None if causal and key_padding_mask is None else real_cells(n, shape, key_padding_mask, q.device)
    q, k, v = (to_grid(x, shape) for x in (q, k, v))
    if not causal:
        return to_sequence(along_columns(q, k, along_rows(q, k, v, real), real, counted=count_tokens)[0], n)
    own = along_rows(q, k, v, real, causal=True)
    own_lse = (q * k).sum(-1) * q.shape[-1] ** -0.5
    if count_tokens:
        own_lse = own_lse + own_count(shape, real, q)
    whole = along_rows(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], None if real is None else real[:, :-1])
    past = None if real is None else real[:, :-1]
    above, above_lse = along_columns(q[:, :, 1:], k[:, :, :-1], whole, past, causal=True, counted=count_tokens)
    above = F.pad(above, (0, 0, 0, 0, 1, 0))
    above_lse = F.pad(above_lse, (0, 0, 1, 0), value=-torch.inf)
    if real is not None:
        own_lse = own_lse.masked_fill(~real[:, None], -torch.inf)
    parts = [(x.flatten(2, 3), lse.flatten(2)) for x, lse in ((own, own_lse), (above, above_lse))]
    return merge(*parts)[0][:, :, :n]


def own_count(shape: tuple[int, ...], real: Bool[Tensor, "#b r c"] | None, like: Tensor) -> Float[Tensor, "#b 1 #r c"]:
    """log N_r of the own row, less log C where all rows before are full and `along_columns` leaves it out."""
    if real is None:
        return (torch.arange(1, shape[1] + 1, device=like.device).to(like.dtype) / shape[1]).log()[None, None, None]
    return real.cumsum(-1).clamp_min(1).to(like.dtype).log()[:, None]


def axial_distance(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    num_columns: int,
    count_tokens: bool,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n"]:
    """The bound on the total variation between the rows of axial and of softmax attention; dense, for analysis."""
    n = q.shape[2]
    shape = grid_shape(n, (num_columns,))
    r, c = shape
    real = real_cells(n, shape, key_padding_mask, q.device)
    real = torch.ones(1, *shape, dtype=torch.bool, device=q.device) if real is None else real
    q, k = (to_grid(x, shape).flatten(2, 3) for x in (q, k))
    seen = real.flatten(1)[:, None, None].expand(-1, 1, r * c, -1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    visible = (seen.tril() if causal else seen).unflatten(3, shape).unflatten(2, shape)
    scores = scores.unflatten(3, shape).unflatten(2, shape)
    logits = scores.masked_fill(~visible, -torch.inf)
    mass = torch.logsumexp(logits, -1).softmax(-1)
    column = scores.diagonal(dim1=3, dim2=5).masked_fill(~visible.diagonal(dim1=3, dim2=5), -torch.inf)
    column = column.movedim(-1, -2)
    if count_tokens:
        column = column + visible.sum(-1).clamp_min(1).to(column.dtype).log()
    weights = column.softmax(-1)
    # The pattern of row r' at the column c is that of the query (r', c) on its whole row: of earlier rows, all of it.
    own = scores.diagonal(dim1=2, dim2=4).movedim(-1, 2)
    pattern = own.masked_fill(~real[:, None, :, None], -torch.inf).softmax(-1).transpose(2, 3)
    within = (logits.softmax(-1) - pattern[:, :, None]).abs().sum(-1) / 2
    within = within.masked_fill(torch.eye(r, dtype=torch.bool, device=q.device)[:, None], 0)
    within = torch.where(weights > 0, weights * within, 0).sum(-1)
    return ((mass - weights).abs().sum(-1) / 2 + within).nan_to_num(1.0).clamp_max(1).flatten(2)[:, :, :n]


class Axial(AbstractAttention):
    """Attention along rows and columns of a grid.

    Args:
        num_columns: C, the length of a row, at least 1. The cost is least near the root of the length.
        count_tokens: an entry of a column counts for as many tokens as its row shows.
    """

    family = "tensor"
    self_attention = True
    row_stochastic = True
    rows_independent = False

    def __init__(self, num_columns: int, count_tokens: bool = True) -> None:
        super().__init__()
        fixed_modes(num_columns, None)
        self.num_columns, self.count_tokens = num_columns, count_tokens

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With one row."""
        return {"num_columns": length}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """Distance between the two rows of weights times the diameter of the values seen, and round-off."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            q, k, v = (torch.where(real, x, 0) for x in (q, k, v))
        distance = axial_distance(q.double(), k.double(), self.num_columns, self.count_tokens, **masks)
        bound = distance * value_diameter(v.double(), **masks)
        # Three softmax computations stand against one.
        return bound.to(q.dtype) + 3 * softmax_round_off(q, k, v)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return axial_attention(
            q, k, v, self.num_columns, self.count_tokens, causal=causal, key_padding_mask=key_padding_mask
        )
