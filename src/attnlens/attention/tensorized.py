"""Tensorized (multilinear) attention: a tensor of rank d with a diagonal core, and a learned map from pairs of places.

    T_ijm = sum_r g_r q_ir k_jr v_mr,   out_i = sum_jm T_ijm W_jm,   W in R^{N x N x dv},   j, m <= i if causal.

There is no softmax; it is linear in each of q, k and v. T has n^3 entries and its unfolding Q diag(g) (V * K)^T is
n x n^2; neither is formed, since r passes the sum over pairs:

    out_i = (q_i * g) A,   A_r = sum_jm k_jr v_mr W_jm;   causal: A_i = sum_{t <= i} B_t,
    B_t,r = k_tr sum_{m <= t} v_mr W_tm + v_tr sum_{j < t} k_jr W_jt,

time O(n^2 d dv), causal twice that, memory O(n d dv). W holds N^2 dv numbers a head for the longest length N: shorter
inputs read W[:n, :n], longer ones are refused. Its target is its own definition.

Source: "A Tensorized Transformer for Language Modeling" (Ma, Zhang, Zhang, Duan, Hou, Song, Zhou, 2019),
https://arxiv.org/abs/1906.09777. Departures. There, blocks share q, k and v and their cores are averaged: for diagonal
cores that is one core, mean_h g^(h), so a block more adds nothing. Here heads have their own q, k, v and core, and
columns of W of their own, which makes as many parameters in W as there. The causal form is ours, as is the start:
g ~ N(0, 1), W ~ N(0, 1/(N^2 d)), so that unit Gaussian inputs of length N give outputs of unit variance.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention


def tensorized_naive(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    core: Float[Tensor, "h d"],
    weight: Float[Tensor, "h n n dv"],
    *,
    causal: bool = False,
) -> Float[Tensor, "b h n dv"]:
    """The definition with the whole tensor T; in float64 when given float64. Padding is zero already."""
    tensor = torch.einsum("hr,bhir,bhjr,bhmr->bhijm", core, q, k, v)
    if causal:
        places = torch.arange(q.shape[2], device=q.device)
        later = torch.maximum(places[:, None], places)
        tensor = tensor.masked_fill(later > places[:, None, None], 0)
    return torch.einsum("bhijm,hjmd->bhid", tensor, weight)


def tensorized_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    core: Float[Tensor, "h d"],
    weight: Float[Tensor, "h m m dv"],
) -> Float[Tensor, "b h n dv"]:
    """Every query over every pair of places; padded keys and values are zero already."""
    partial = torch.einsum("bhmr,hjmd->bhjrd", v, weight)
    total = torch.einsum("bhjr,bhjrd->bhrd", k, partial)
    return (q * core[:, None]) @ total


def causal_tensorized(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    core: Float[Tensor, "h d"],
    weight: Float[Tensor, "h n n dv"],
) -> Float[Tensor, "b h n dv"]:
    """Pairs of places up to each query, by what every place t adds: the pairs (t, m <= t) and (j < t, t)."""
    lower = weight.movedim(-1, 1).tril().movedim(1, -1)
    upper = weight.movedim(-1, 1).triu(1).movedim(1, -1)
    added = k[..., None] * torch.einsum("bhmr,htmd->bhtrd", v, lower)
    added = added + v[..., None] * torch.einsum("bhjr,hjtd->bhtrd", k, upper)
    return torch.einsum("bhir,bhird->bhid", q * core[:, None], added.cumsum(2))


class Tensorized(AbstractAttention):
    """Multilinear attention with a learned map from pairs of places to outputs.

    Args:
        head_dim: d, of queries and keys. Values may be narrower: the rank is then theirs, and W loses its last columns.
        num_heads: each with its own core and its own W.
        max_length: N.
        seed: of the initial core and W.
    """

    family = "tensor"
    target = "itself"
    pairwise = False
    one_query = True

    def __init__(self, head_dim: int, num_heads: int, max_length: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.core = nn.Parameter(torch.randn(num_heads, head_dim, generator=generator, device="cpu"))
        weight = torch.randn(num_heads, max_length, max_length, head_dim, generator=generator, device="cpu")
        self.weight = nn.Parameter(weight / (max_length * head_dim**0.5))

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """It is its own definition."""
        return {}

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """The definition with the whole tensor, in float64."""
        q, k, v = q.double(), k.double(), v.double()
        if key_padding_mask is not None:
            k, v = (torch.where(key_padding_mask[:, None, :, None], x, 0) for x in (k, v))
        return tensorized_naive(*self._sized(q, k, v), causal=causal)

    def matrix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """There is none: W mixes the channels of the values.

        Raises:
            ValueError: always.
        """
        raise ValueError("Tensorized has no matrix of queries by keys: `pairwise` is False")

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        # A padded token is a zero key and a zero value, and takes part in no product.
        parts = self._sized(q, k, v)
        return causal_tensorized(*parts) if causal else tensorized_attention(*parts)

    def _sized(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, core and W of this length and of the rank of the values, in the precision of q."""
        num_heads, max_length, _, head_dim = self.weight.shape
        if k.shape[2] > max_length:
            raise ValueError(
                f"W is made for at most `max_length` {max_length} tokens, got {k.shape[2]}: build for the longest input"
            )
        if (q.shape[1], q.shape[3]) != (num_heads, head_dim) or v.shape[3] > head_dim:
            raise ValueError(
                f"built for {num_heads} heads of {head_dim} and values no wider, got {q.shape[1]} heads of {q.shape[3]}"
                f" and values of {v.shape[3]}"
            )
        rank, length = v.shape[3], k.shape[2]
        weight = self.weight[:, :length, :length, :rank].to(q.dtype)
        # A NaN query shows in its row even where its channel is beyond the rank of narrower values.
        rest = (q[..., rank:] * 0).sum(-1, keepdim=True)
        return q[..., :rank] + rest, k[..., :rank], v, self.core[:, :rank].to(q.dtype), weight
