"""Retention: linear attention without normalization that forgets at a fixed rate, one for each head.

    out_i = s sum_j gamma_h^{|i - j|} <q_i, k_j> v_j,   gamma_h = 1 - 2^{-5-h},   h = 0, 1, ...,   s = 1/sqrt(d),

over j <= i if causal, which is S_i = gamma S_{i-1} + k_i v_i^T, out_i = s S_i^T q_i. Time O(n c (d + dv) + n d dv) in
chunks of c <= 64 tokens, memory O(n (d + dv)), a causal state of d dv numbers. An attention of its own: it approximates
softmax in no limit, and its target is its own definition with the matrix materialized in float64. Row sums are not one.

Source: "Retentive Network: A Successor to Transformer for Large Language Models" (Sun et al., 2023),
https://arxiv.org/abs/2307.08621.

Departures from the paper. Rotations of q and k (xPos) belong to the projection. Its three normalizations of scores are
there to keep numbers in range and cancel in the group norm that follows; that norm belongs to the model, and only s
remains. The bidirectional form is ours: the same weight in both directions, and tokens of padding are not counted in
|i - j|. With fewer queries than keys, q are the last tokens.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.decay import decayed_dense, in_both_directions, masked_tokens
from attnlens.linalg.scan import ScanState, chunked_scan, empty_state


def retention_log_decay(k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h m"]:
    """log gamma_h at every token of k."""
    heads = torch.arange(k.shape[1], dtype=k.dtype, device=k.device)
    return torch.log1p(-torch.exp2(-5 - heads))[:, None].expand(k.shape[:3])


class Retention(AbstractRecurrentAttention):
    """Fixed exponential decay; no parameter, no draw."""

    family = "recurrent"
    target = "itself"

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
        """The definition pair by pair, in float64."""
        q, k, v = q.double() * q.shape[-1] ** -0.5, *(masked_tokens(x.double(), key_padding_mask) for x in (k, v))
        return decayed_dense(q, k, v, masked_tokens(retention_log_decay(k), key_padding_mask), causal=causal)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        log_decay = masked_tokens(retention_log_decay(k), key_padding_mask)
        q = q * q.shape[-1] ** -0.5
        if causal:
            return chunked_scan(q, k, v, log_decay=log_decay)[1]
        return in_both_directions(lambda q, k, v, g: chunked_scan(q, k, v, log_decay=g)[1], q, k, v, log_decay)

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> ScanState:
        """An empty memory."""
        return empty_state(batch, num_heads, head_dim, value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[ScanState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n d dv), whatever came before."""
        memory = ScanState(*state).memory
        dtype = memory.dtype
        keys = k.to(dtype)
        after, out = chunked_scan(
            q.to(dtype) * q.shape[-1] ** -0.5,
            keys,
            v.to(dtype),
            log_decay=retention_log_decay(keys),
            state=memory,
            final_state=True,
        )
        assert after is not None
        return ScanState(after), out.to(q.dtype)
