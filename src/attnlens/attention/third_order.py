"""Third-order (tensor) attention: a query weighs pairs of tokens, by a softmax over all pairs.

    out_i = sum_jk exp(s l_ijk) (v1_j * v2_k) / sum_jk exp(s l_ijk),   s = 1/sqrt(d),   j, k <= i if causal,
    l_ijk = sum_c q_ic k1_jc k2_kc                    (`logits="product"`: trilinear), or
    l_ijk = sum_b det[q_ib, k1_jb, k2_kb]             (`logits="determinant"`: over blocks of 3 coordinates),

* entry by entry. Every token brings two keys and two values: k = [k1|k2], v = [v1|v2]. For fixed j it is softmax
attention of the queries q_i * k1_j (or of q_i x k1_j, since det[q, k, k'] = <q x k, k'>) over the keys k2:

    (u_ij, L_ij) = partial attention over k,   out_i = sum_j softmax_j(L_ij) (v1_j * u_ij),

a block of j at a time, blocks merged by their log-sum-exp. Time O(n^3 (d + dv)); memory O(n block (d + dv)), which
autograd makes O(n^2 (d + dv)): neither the n x n^2 matrix nor n x block x n logits. Its target is its own definition.
Equals softmax attention where k2 and v2 are ones at all tokens. One layer with one head of width 5 decides Match3: see
docs/expressivity.md.

Sources: "Representational Strengths and Limitations of Transformers" (Sanford, Hsu, Telgarsky, 2023),
https://arxiv.org/abs/2306.02896; "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to
Kronecker Computation" (Alman, Song, 2023), https://arxiv.org/abs/2310.04064; determinant logits: "Fast and Simplex:
2-Simplicial Attention in Triton" (Roy et al., 2025), https://arxiv.org/abs/2507.02754. Departures: the scale 1/sqrt(d)
for both logits; all pairs, where the last source slides two windows.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.partial import merge, partial_attention

BLOCK = 16


def pair_queries(
    q: Float[Tensor, "*#batch d"], k1: Float[Tensor, "*#batch d"], logits: str
) -> Float[Tensor, "*batch d"]:
    """The vectors whose inner products with k2 are the logits of pairs with this k1."""
    if logits == "product":
        return q * k1
    return torch.linalg.cross(q.unflatten(-1, (-1, 3)), k1.unflatten(-1, (-1, 3))).flatten(-2)


def third_order_naive(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d2"],
    v: Float[Tensor, "b h m dv2"],
    *,
    logits: str = "product",
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """The definition with all n x m x m weights; in float64 when given float64. Padding is not read."""
    real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    real = real if key_padding_mask is None else key_padding_mask
    (k1, k2), (v1, v2) = (torch.where(real[:, None, :, None], x, 0).chunk(2, -1) for x in (k, v))
    if logits == "product":
        scores = torch.einsum("bhnd,bhjd,bhkd->bhnjk", q, k1, k2)
    else:
        rows = (q[:, :, :, None, None], k1[:, :, None, :, None], k2[:, :, None, None])
        blocks = torch.broadcast_tensors(*(x.unflatten(-1, (-1, 3)) for x in rows))
        scores = torch.linalg.det(torch.stack(blocks, -2)).sum(-1)
    seen = real[:, None, None, :].expand(*q.shape[:3], -1)
    seen = seen.tril() if causal else seen
    pairs = (seen[..., :, None] & seen[..., None, :]).flatten(-2)
    scores = (scores * q.shape[-1] ** -0.5).flatten(-2).masked_fill(~pairs, -torch.inf)
    # A finite floor: a row that sees nothing has zero weights, and no NaN in its gradient.
    weights = torch.softmax(scores.clamp_min(torch.finfo(q.dtype).min / 4), -1).masked_fill(~pairs, 0)
    return torch.einsum("bhnjk,bhjd,bhkd->bhnd", weights.unflatten(-1, (k.shape[2], -1)), v1, v2)


def over_second(
    queries: Float[Tensor, "b h j n d"],
    k2: Float[Tensor, "b h m d"],
    v2: Float[Tensor, "b h m dv"],
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> tuple[Float[Tensor, "b h j n dv"], Float[Tensor, "b h j n"]]:
    """(u, L) of the module docstring for a block of first tokens; they stand among the heads."""
    h, j = queries.shape[1:3]
    keys, values = (x[:, :, None].expand(-1, -1, j, -1, -1).flatten(1, 2) for x in (k2, v2))
    scale = queries.shape[-1] ** -0.5
    masks = {"causal": causal, "key_padding_mask": key_padding_mask}
    out, lse = partial_attention(queries.flatten(1, 2), keys, values, scale=scale, **masks)
    return out.unflatten(1, (h, j)), lse.unflatten(1, (h, j))


def over_first(
    u: Float[Tensor, "b h j n dv"],
    lse: Float[Tensor, "b h j n"],
    v1: Float[Tensor, "b h j dv"],
    hidden: Bool[Tensor, "#b 1 j #n"],
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """The attention over the pairs of one block and its log-sum-exp."""
    hidden = (hidden | (lse == -torch.inf)).detach()
    # A finite floor keeps the softmax of an all-empty row, and its gradient, free of NaN.
    lse = lse.masked_fill(hidden, torch.finfo(lse.dtype).min / 4)
    weights = torch.softmax(lse, 2).masked_fill(hidden, 0)
    out = (weights[..., None] * v1[:, :, :, None] * u).sum(2)
    return out, torch.logsumexp(lse, 2).masked_fill(hidden.all(2), -torch.inf)


def third_order_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d2"],
    v: Float[Tensor, "b h m dv2"],
    *,
    logits: str = "product",
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
    block: int = BLOCK,
) -> Float[Tensor, "b h n dv"]:
    """The streamed form; padded keys and values are zero already."""
    (k1, k2), (v1, v2) = k.chunk(2, -1), v.chunk(2, -1)
    rows = torch.arange(q.shape[2], device=q.device)
    real = key_padding_mask
    if real is None:
        real = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device)
    total = None
    for start, (keys, values) in enumerate(zip(k1.split(block, 2), v1.split(block, 2), strict=True)):
        first = torch.arange(start * block, start * block + keys.shape[2], device=q.device)
        hidden = ~real[:, None, start * block : start * block + keys.shape[2], None]
        hidden = hidden | (first[:, None] > rows) if causal else hidden
        queries = pair_queries(q[:, :, None], keys[:, :, :, None], logits)
        part = over_first(*over_second(queries, k2, v2, causal, key_padding_mask), values, hidden)
        total = part if total is None else merge(total, part)
    assert total is not None, "at least one key"
    return total[0]


class ThirdOrder(AbstractAttention):
    """Softmax attention over pairs of tokens; exact.

    Args:
        logits: "product", or "determinant", which needs `head_dim` divisible by 3.
    """

    family = "tensor"
    target = "itself"
    row_stochastic = True
    arity = 2
    pairwise = False
    one_query = True

    def __init__(self, logits: str = "product") -> None:
        super().__init__()
        if logits not in ("product", "determinant"):
            raise ValueError(f"`logits` must be 'product' or 'determinant', got {logits!r}")
        self.logits = logits

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """It is its own definition."""
        return {}

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d2"],
        v: Float[Tensor, "b h m dv2"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """The definition pair by pair, in float64."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return third_order_naive(q.double(), k.double(), v.double(), logits=self.logits, **masks)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d2"],
        v: Float[Tensor, "b h m dv2"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        if self.logits == "determinant" and q.shape[3] % 3:
            raise ValueError(f"determinants need a `head_dim` divisible by 3, got {q.shape[3]}")
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return third_order_attention(q, k, v, logits=self.logits, **masks)
