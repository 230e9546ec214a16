"""The gated delta rule: the delta rule on a memory that forgets, at a rate and with a step size read from the key.

    S_i = a_i S_{i-1} + beta_i k_i (v_i - a_i S_{i-1}^T k_i)^T = a_i (I - beta_i k_i k_i^T) S_{i-1} + beta_i k_i v_i^T,
    out_i = S_i^T q_i,   beta_i = sigmoid(<w_h, k_i> + b_h),   a_i = sigmoid(<w'_h, k_i> + b'_h),

with q and k scaled to unit length in the updates and readings. Bidirectional, every query reads the state after the
last token. Time O(n c (d + dv) + n d dv) in chunks of c <= 64 tokens, each with a triangular system of c unknowns for
what its tokens write; memory O(n (d + dv)), a causal state of d dv numbers. An attention of its own: its target is its
definition as one triangular system of n unknowns in float64. It is `delta` where a = 1. Rows of its matrix have no
fixed sum and no fixed sign.

Source: "Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang, Kautz, Hatamizadeh, 2025),
https://arxiv.org/abs/2412.06464.

Departures from the paper. Gates are read from the head's own key before scaling, not from the token; the decay is a
sigmoid instead of Mamba-2's e^{-a softplus}; convolution, activation, norm and output gate belong to the model. A decay
below the smallest normal number counts as that number. Padding has beta = 0 and a = 1.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.decay import bounded_decay, masked_tokens
from attnlens.linalg.delta_rule import delta_dense, delta_rule, unit
from attnlens.linalg.head_map import gaussian_map
from attnlens.linalg.scan import ScanState, chunked_scan, empty_state


class GatedDelta(AbstractRecurrentAttention):
    """A corrected linear memory with learned step sizes and decays.

    Args:
        head_dim: of queries and keys.
        num_heads: every head has its own gates.
        seed: of the gates' initial weights, N(0, 1/head_dim).
        decay_bias: the initial b'; 4 keeps 0.98 of the memory a token, a half-life of 38.
    """

    family = "recurrent"
    target = "itself"

    def __init__(self, head_dim: int, num_heads: int, seed: int, decay_bias: float = 4.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.step_size = gaussian_map(num_heads, head_dim, 1, generator)
        self.decay = gaussian_map(num_heads, head_dim, 1, generator, decay_bias)

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
        """The definition as one linear system, in float64."""
        k, v = (masked_tokens(x.double(), key_padding_mask) for x in (k, v))
        beta, log_decay = self._gates(k, key_padding_mask)
        return delta_dense(unit(q.double()), unit(k), v, beta, log_decay, causal=causal)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        beta, log_decay = self._gates(k, key_padding_mask)
        return delta_rule(q, k, v, beta, log_decay, causal=causal)

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
        queries, keys, values = (x.to(memory.dtype) for x in (q, k, v))
        beta, log_decay = self._gates(keys, None)
        after, out = chunked_scan(
            queries, keys, values, log_decay=log_decay, beta=beta, state=memory, final_state=True, unit=True
        )
        assert after is not None
        return ScanState(after), out.to(q.dtype)

    def _gates(self, k: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """beta and log a, zero at padding."""
        beta = self.step_size(k).squeeze(-1).sigmoid()
        log_decay = bounded_decay(-F.softplus(-self.decay(k).squeeze(-1)))
        return masked_tokens(beta, key_padding_mask), masked_tokens(log_decay, key_padding_mask)
