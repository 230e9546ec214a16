"""Reformer attention: queries that are their own keys, compared only where they hash into one bucket.

Keys are k_j = q_j / |q_j|; what is passed as k is not read. Round r sends each token to one of B buckets,
b_r(j) = argmax([W_r q_j; -W_r q_j]), and gives it the rank t_r(j) = number of earlier tokens in its bucket. A bucket is
cut by rank into chunks of c, and a token sees its own and the previous chunk of its bucket:

    P_i = {j != i : b_r(j) = b_r(i), floor(t_r(i) / c) - floor(t_r(j) / c) in {0, 1} for some r}   (and j < i causal),
    out_i = sum_{j in P_i} e^{<q_i, k_j>} v_j / sum_{j in P_i} e^{<q_i, k_j>},   out_i = v_i if P_i is empty.

Rounds are merged by their log-sum-exp, a pair found in N_ij rounds with its logit smaller by log N_ij in each, which
makes the merge the softmax over the union. Logits have no further scale: keys are of unit length. Time
O(R n (c (d + R) + B d + log n)), memory O(n c) a round. Its target is the same with P_i = all others (shared-QK
softmax), which it equals with one bucket and c >= n.

Ranks count the past only and belong to the token, so the causal form leaks nothing: the paper's chunks, cut from all
tokens sorted by bucket, move when a later token enters an earlier bucket. The same chunks serve the bidirectional form.
Buckets are constants for the gradient.

Source: "Reformer: The Efficient Transformer" (Kitaev, Kaiser, Levskaya, 2020), https://arxiv.org/abs/2001.04451.
Departures: chunks within buckets (above); a token sees itself only where it sees nothing else, exactly, where the code
subtracts 1e5; the number of buckets is fixed at construction (by default 2 max_length / c, the paper's for the longest
input), since one that follows the length would let the length in.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import fold, inverse, take_rows, unfold
from attnlens.linalg.dense import softmax_round_off
from attnlens.linalg.partial import merge, partial_attention

NOWHERE = -4  # a label that is neither equal to nor one below any token's


def polytope_buckets(x: Float[Tensor, "b h n d"], rotations: Float[Tensor, "h d r k"]) -> Int[Tensor, "b h r n"]:
    """argmax([W_r x; -W_r x]) in 0 .. 2 k - 1 for every round; a single bucket where k = 0. No gradient."""
    r, k = rotations.shape[2:]
    if k == 0:
        return torch.zeros(*x.shape[:2], r, x.shape[2], dtype=torch.long, device=x.device)
    w = (x.detach() @ rotations.flatten(2).to(x.dtype)).unflatten(-1, (r, k))
    return torch.cat([w, -w], -1).argmax(-1).transpose(2, 3).contiguous()


def chunk_labels(
    buckets: Int[Tensor, "b h r n"], num_buckets: int, chunk_size: int, mask: Bool[Tensor, "b n"] | None
) -> tuple[Int[Tensor, "b h r n"], Int[Tensor, "b h r n"]]:
    """A number for every chunk, in which the next chunk of a bucket is the next number and no other bucket's is; and
    the tokens in the order of (bucket, position). Padding is in a bucket of its own."""
    n = buckets.shape[-1]
    if mask is not None:
        buckets = torch.where(mask[:, None, None], buckets, num_buckets)
    ordered, order = buckets.sort(dim=-1, stable=True)
    rank = inverse(order) - torch.searchsorted(ordered, buckets)
    return buckets * (n // chunk_size + 2) + rank // chunk_size, order


def sees(of_rows: Int[Tensor, "*k n #m"], of_columns: Int[Tensor, "*k #n m"]) -> Bool[Tensor, "*k n m"]:
    """Whether the column's chunk is the row's or the one before it."""
    return (of_rows - of_columns) >> 1 == 0


def _neighborhood(x: Tensor, before: int, after: int) -> Tensor:
    """Blocks (bh, t, c, f) beside the `before` ones before and the `after` ones after: (bh, t, (1 + both) c, f)."""
    t = x.shape[1]
    x = F.pad(x, (0, 0, 0, 0, before, after))
    return torch.cat([x[:, start : start + t] for start in range(before + after + 1)], 2)


def _round(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    labels: Int[Tensor, "b h n r"],
    order: Int[Tensor, "b h n"],
    this: int,
    chunk_size: int,
    causal: bool,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """`(out, lse)` of one round, every pair weighed by one over the number of rounds that hold it.

    In the order of (bucket, position) the two chunks of a row lie within 2 c places before and c after it.
    """
    h, n = q.shape[1:3]
    size = min(chunk_size, n)
    blocks = -(-n // size)
    before, after = min(2, blocks - 1), 0 if causal else min(1, blocks - 1)
    rows, keys, values = (fold(take_rows(x, order), size) for x in (q, k, v))
    # Labels and positions are shifted so that the zeros with which blocks are filled up stand for NOWHERE.
    position = torch.arange(n, device=q.device).expand(*order.shape)[..., None]
    facts = torch.cat([labels - NOWHERE, position], -1).to(torch.int32)
    facts = fold(facts.gather(2, order[..., None].expand_as(facts)), size)
    around = _neighborhood(facts, before, after)
    at, near = facts[..., :, None, :], around[..., None, :, :]
    count = sum(sees(at[..., r], near[..., r]).to(q.dtype) for r in range(labels.shape[-1]))
    visible = sees(at[..., this], near[..., this])
    visible = visible & (near[..., -1] < at[..., -1] if causal else near[..., -1] != at[..., -1])
    bias = -torch.where(visible, count, torch.inf).log()
    keys, values = _neighborhood(keys, before, after), _neighborhood(values, before, after)
    out, lse = partial_attention(rows, keys, values, bias=bias, scale=1.0)
    place = inverse(order)
    return take_rows(unfold(out, h, n), place), unfold(lse[..., None], h, n)[..., 0].gather(-1, place)


def reformer_attention(
    q: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    rotations: Float[Tensor, "h d r k"],
    chunk_size: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Shared-QK attention over the union of the rounds' chunks."""
    labels, order = chunk_labels(
        polytope_buckets(q, rotations), max(1, 2 * rotations.shape[-1]), chunk_size, key_padding_mask
    )
    k, by_token = F.normalize(q, dim=-1), labels.transpose(2, 3)
    rounds = range(labels.shape[2])
    out, lse = merge(*(_round(q, k, v, by_token, order[:, :, r], r, chunk_size, causal) for r in rounds))
    return torch.where((lse == -torch.inf)[..., None], v, out)


def shared_softmax_weights(
    q: Float[Tensor, "b h n d"], *, causal: bool, key_padding_mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b h n n"]:
    """The target's matrix: softmax of <q_i, q_j / |q_j|> over j != i, or 1 at j = i where there is no other."""
    n = q.shape[2]
    eye = torch.eye(n, dtype=torch.bool, device=q.device)
    hidden = eye | torch.ones_like(eye).triu(1) if causal else eye
    hidden = hidden.expand(q.shape[0], 1, n, n)
    if key_padding_mask is not None:
        hidden = hidden | ~key_padding_mask[:, None, None]
    hidden = torch.where(hidden.all(-1, keepdim=True), ~eye, hidden)
    return torch.softmax((q @ F.normalize(q, dim=-1).mT).masked_fill(hidden, -torch.inf), -1)


class Reformer(AbstractAttention):
    """Shared-QK attention by locality-sensitive hashing.

    Args:
        chunk_size: tokens of a chunk, at least 1; a token sees twice as many a round at most.
        num_rounds: rounds of hashing, at least 1.
        head_dim: of queries and keys.
        num_heads: each draws its own rotations.
        max_length: the longest input; it sets the default number of buckets only.
        seed: of the rotations.
        num_buckets: 1 or an even number; by default 2 max_length / chunk_size rounded up to an even number, and 1 once
            chunk_size is at least 2 max_length.
    """

    family = "clustering"
    budget = "chunk_size"
    target = "shared-QK softmax"
    self_attention = True
    row_stochastic = True
    rows_independent = False

    def __init__(
        self,
        chunk_size: int,
        num_rounds: int,
        head_dim: int,
        num_heads: int,
        max_length: int,
        seed: int,
        num_buckets: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("chunk_size", chunk_size), ("num_rounds", num_rounds)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if num_buckets is None:
            num_buckets = 1 if chunk_size >= 2 * max_length else 2 * -(-max_length // chunk_size)
        if num_buckets < 1 or (num_buckets > 1 and num_buckets % 2):
            raise ValueError(
                f"`num_buckets` must be 1 or even, got {num_buckets}: a direction and its opposite make two"
            )
        self.chunk_size = chunk_size
        generator = torch.Generator().manual_seed(seed)
        self.rotations: Tensor
        sizes = num_heads, head_dim, num_rounds, num_buckets // 2
        self.register_buffer("rotations", torch.randn(*sizes, generator=generator, device="cpu"))

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With one bucket that is one chunk."""
        return {"chunk_size": length, "num_buckets": 1}

    def visible(
        self, q: Float[Tensor, "b h n d"], *, causal: bool, key_padding_mask: Bool[Tensor, "b n"] | None
    ) -> Bool[Tensor, "b h n n"]:
        """The pairs of P_i, materialized: analysis, not the fast path."""
        buckets = polytope_buckets(q, self.rotations)
        count = max(1, 2 * self.rotations.shape[-1])
        labels, _ = chunk_labels(buckets, count, self.chunk_size, key_padding_mask)
        union = sees(labels[..., :, None], labels[..., None, :]).any(2)
        union = union & ~torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        return union.tril() if causal else union

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """The target's mass outside P_i times the diameter of the values, from the dense matrix: analysis.

        With delta_i that mass, the target is (1 - delta_i) a + delta_i b for two means of values, a over P_i, which the
        operator returns, and b over the rest: the error is delta_i |b - a|. Where P_i is empty the operator returns
        v_i, and delta_i = 1 unless the target does too. Round-off is added.
        """
        real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        rows, values = (torch.where(real[:, None, :, None], x, 0).double() for x in (q, v))
        weights = shared_softmax_weights(rows, causal=causal, key_padding_mask=key_padding_mask)
        own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        seen = self.visible(rows.to(q.dtype), causal=causal, key_padding_mask=key_padding_mask)
        dropped = weights.masked_fill(torch.where(seen.any(-1, keepdim=True), seen, own), 0).sum(-1)
        pairs = real[:, None, :, None] & real[:, None, None, :]
        diameter = torch.cdist(values, values).masked_fill(~pairs, 0).amax((-2, -1))[..., None]
        unscaled = rows.to(q.dtype) * q.shape[-1] ** 0.5
        round_off = softmax_round_off(unscaled, F.normalize(rows.to(q.dtype), dim=-1), values.to(q.dtype))
        return (dropped * diameter + round_off).to(q.dtype)

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """Shared-QK softmax in float64; k is not read."""
        q, v = q.double(), v.double()
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            q, v = torch.where(real, q, 0), torch.where(real, v, 0)
        return shared_softmax_weights(q, causal=causal, key_padding_mask=key_padding_mask) @ v

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        draws = self.rotations, self.chunk_size
        return reformer_attention(q, v, *draws, causal=causal, key_padding_mask=key_padding_mask)
