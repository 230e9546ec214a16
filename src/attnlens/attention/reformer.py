"""Reformer attention: queries that are their own keys, compared only where they hash into one bucket.

Keys are k_j = q_j / |q_j|; what is passed as k is not read. Round r sends each token to one of B buckets,
b_r(j) = argmax([W_r q_j; -W_r q_j]), and gives it the rank t_r(j) = number of earlier tokens in its bucket. A bucket is
cut by rank into chunks of c, and a token sees its own and the previous chunk of its bucket:

    P_i = {j != i : b_r(j) = b_r(i), floor(t_r(i) / c) - floor(t_r(j) / c) in {0, 1} for some r}   (and j < i causal),
    out_i = sum_{j in P_i} e^{<q_i, k_j>} v_j / sum_{j in P_i} e^{<q_i, k_j>},   out_i = v_i if P_i is empty.

Rounds are merged by their log-sum-exp. A pair that several rounds hold counts in the first of them, so that the rounds
are disjoint and their merge is the softmax over the union. Logits have no further scale: keys are of unit length. Time
O(R n (c (d + R) + B d + log n)), memory O(R n d), masks included. Its target is the same with P_i = all others
(shared-QK softmax), which it equals with one bucket and c >= n.

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
from attnlens.linalg.blocks import fold, inverse, scores_at_once, take_rows
from attnlens.linalg.dense import softmax_round_off
from attnlens.linalg.hashing import polytope_buckets
from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.ranked_chunks import Band, band_bias, chunk_labels, run_bands, sees, widest_band
from attnlens.linalg.windows import windows


def _run(
    kv: Float[Tensor, "g 1 n f"],
    norm: Float[Tensor, "g 1 n 1"],
    labels: Int[Tensor, "r g p"],
    token: Int[Tensor, "g p"],
    band: Band,
    causal: bool,
    head_dim: int,
) -> tuple[Float[Tensor, "g t s dv"], Float[Tensor, "g t s"]]:
    """`(out, lse)` of consecutive tiles of the last of the rounds."""
    bias = band_bias(labels, band, causal, kv.dtype)
    k, v = take_rows(kv, token[:, None]).tensor_split([head_dim], -1)
    rows = slice(band.before, token.shape[1] - band.after)
    q = k[:, :, rows] * take_rows(norm, token[:, None, rows])
    keys, values = (windows(x, band.width, band.size).flatten(0, 1) for x in (k, v))
    return partial_attention(fold(q, band.size), keys, values, bias=bias, scale=1.0)


def _round(
    kv: Float[Tensor, "g 1 n f"],
    norm: Float[Tensor, "g 1 n 1"],
    labels: Int[Tensor, "r g n"],
    order: Int[Tensor, "g n"],
    widest: Band,
    causal: bool,
    head_dim: int,
) -> tuple[Float[Tensor, "g 1 n dv"], Float[Tensor, "g 1 n"]]:
    """`(out, lse)` of the pairs that the last of the rounds has and none before it, in the order of the tokens."""
    (g, n), (size, before, after) = order.shape, widest
    tiles = -(-n // size)
    labels = labels.gather(2, order.expand_as(labels))
    slot = torch.arange(-before, tiles * size + after, device=order.device)
    inside = slot.clamp(0, n - 1)
    token = order[:, inside]
    # A label that is two below any other is seen by no row.
    doubled = 2 * torch.where(slot == inside, labels[..., inside], -2)
    at_once = max(-(-widest.width // size), scores_at_once(kv) // (g * size * widest.width))
    parts = []
    for first, band in zip(range(0, tiles, at_once), run_bands(labels[-1], widest, at_once), strict=True):
        start, end = before + first * size, before + min(first + at_once, tiles) * size
        run = slice(start - band.before, end + band.after)
        parts.append(_run(kv, norm, doubled[..., run], token[:, run], band, causal, head_dim))
    out, lse = (torch.cat(x, 1).flatten(1, 2)[:, None] for x in zip(*parts, strict=True))
    place = inverse(order)[:, None]
    return take_rows(out, place), lse.gather(2, place)


def _heads(
    q: Float[Tensor, "g n d"],
    v: Float[Tensor, "g n dv"],
    labels: Int[Tensor, "g r n"],
    order: Int[Tensor, "g r n"],
    band: Band,
    causal: bool,
) -> Float[Tensor, "g n dv"]:
    q, v = q[:, None], v[:, None]
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(1e-12)  # as in F.normalize
    kv = torch.cat([q / norm, v], -1)
    rounds, labels = range(labels.shape[1]), labels.transpose(0, 1)
    parts = [_round(kv, norm, labels[: r + 1], order[:, r], band, causal, q.shape[3]) for r in rounds]
    out, lse = merge(*parts)
    return torch.where((lse == -torch.inf)[..., None], v, out)[:, 0]


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
    n, num_buckets = q.shape[2], max(1, 2 * rotations.shape[-1])
    labels, order = chunk_labels(polytope_buckets(q, rotations), num_buckets, chunk_size, key_padding_mask)
    short = 2 * (n // chunk_size + 2 * num_buckets + 4) < 2**15  # a bound on the labels, doubled
    labels = labels.to(torch.int16 if short else torch.int32)
    band = widest_band(n, chunk_size, causal)
    at_once = max(1, scores_at_once(q) // (min(n, 1024) * band.width))
    heads = [x.flatten(0, 1).split(at_once) for x in (q, v, labels, order)]
    parts = [_heads(*part, band=band, causal=causal) for part in zip(*heads, strict=True)]
    return torch.cat(parts).view_as(v)


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
