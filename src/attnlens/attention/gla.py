"""Gated linear attention: an unnormalized linear memory in which every channel forgets at a rate read from the key.

    S_i = diag(a_i) S_{i-1} + k_i v_i^T,   out_i = s S_i^T q_i,   a_i = sigmoid(W_h k_i + b_h)^{1/tau},   s = 1/sqrt(d),

or, pair by pair, out_i = s sum_{j <= i} sum_c q_ic k_jc (a_{j+1,c} ... a_{i,c}) v_j. Bidirectional, a pair is weighed
by the decays between its two positions from either side. Time O(n c (d + dv) + n d dv + n d log c) in chunks of
c <= 32 tokens, memory O(n (c + d log c + dv)), a causal state of d dv numbers. An attention of its own: its target is
its definition with the matrix materialized in float64. Row sums are not one.

Source: "Gated Linear Attention Transformers with Hardware-Efficient Training" (Yang, Wang, Shen, Panda, Kim, 2024),
https://arxiv.org/abs/2312.06635.

Departures from the paper. The gate is a map of the head's own key, not of the token that the key was projected from,
and of full rank instead of 16; the norm and the output gate belong to the model. A decay below the smallest normal
number counts as that number. The bidirectional form is ours; with fewer queries than keys, q are the last tokens.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.channel_scan import channel_scan
from attnlens.linalg.decay import bounded_decay, decayed_dense, in_both_directions, masked_tokens
from attnlens.linalg.head_map import gaussian_map
from attnlens.linalg.scan import ScanState, empty_state


class Gla(AbstractRecurrentAttention):
    """Gated linear attention with learned gates.

    Args:
        head_dim: of queries and keys.
        num_heads: every head has its own gate.
        seed: of the gates' initial weights, N(0, 1/head_dim); their biases start at zero.
        temperature: tau, positive; a gate at 1/2 keeps 2^{-1/tau}, with the paper's 16 a half-life of 16 tokens.
    """

    family = "recurrent"
    target = "itself"

    def __init__(self, head_dim: int, num_heads: int, seed: int, temperature: float = 16.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}; the paper has 16")
        self.temperature = temperature
        generator = torch.Generator().manual_seed(seed)
        self.gate = gaussian_map(num_heads, head_dim, head_dim, generator)

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
        k, v = (masked_tokens(x.double(), key_padding_mask) for x in (k, v))
        q, log_decay = self._scaled(q.double(), k)
        return decayed_dense(q, k, v, masked_tokens(log_decay, key_padding_mask), causal=causal)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        q, log_decay = self._scaled(q, k)
        log_decay = masked_tokens(log_decay, key_padding_mask)
        if causal:
            return channel_scan(q, k, v, log_decay)[1]
        return in_both_directions(lambda *run: channel_scan(*run)[1], q, k, v, log_decay)

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
        keys, values = k.to(memory.dtype), v.to(memory.dtype)
        queries, log_decay = self._scaled(q.to(memory.dtype), keys)
        after, out = channel_scan(queries, keys, values, log_decay, state=memory, final_state=True)
        assert after is not None
        return ScanState(after), out.to(q.dtype)

    def _scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """s q and the log decays log a."""
        return q * q.shape[-1] ** -0.5, bounded_decay(-F.softplus(-self.gate(k)) / self.temperature)
