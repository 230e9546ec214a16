"""The delta rule: a linear memory that replaces what it holds for a key by the new value, as far as a gate says.

    S_i = S_{i-1} + beta_i k_i (v_i - S_{i-1}^T k_i)^T,   out_i = S_i^T q_i,   beta_i = sigmoid(<w_h, k_i> + b_h),

with q and k scaled to unit length in the updates and readings. Bidirectional, every query reads the state after the
last token. Time O(n c (d + dv) + n d dv) in chunks of c <= 64 tokens, each with a triangular system of c unknowns for
what its tokens write; memory O(n (d + dv)), a causal state of d dv numbers. An attention of its own: its target is its
definition as one triangular system of n unknowns in float64. With orthonormal keys and beta = 1 a query that equals a
key gets the latest value stored for it, exactly. Rows of its matrix have no fixed sum and no fixed sign.

Sources: "Linear Transformers Are Secretly Fast Weight Programmers" (Schlag, Irie, Schmidhuber, 2021),
https://arxiv.org/abs/2102.11174; "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (Yang,
Wang, Zhang, Shen, Kim, 2024), https://arxiv.org/abs/2406.06484.

Departures from the papers. The gate is read from the head's own key before scaling, not from the token; the activation
of q and k belongs to the projection; no 1/sqrt(d), since q and k have unit length. Padding writes with beta = 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.decay import masked_tokens
from attnlens.linalg.delta_rule import delta_dense, delta_rule, unit
from attnlens.linalg.head_map import gaussian_map
from attnlens.linalg.scan import ScanState, chunked_scan, empty_state


class Delta(AbstractRecurrentAttention):
    """A corrected linear memory with learned step sizes.

    Args:
        head_dim: of queries and keys.
        num_heads: every head has its own gate.
        seed: of the gates' initial weights, N(0, 1/head_dim); with their biases at zero, steps start around 1/2.
    """

    family = "recurrent"
    target = "itself"

    def __init__(self, head_dim: int, num_heads: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.step_size = gaussian_map(num_heads, head_dim, 1, generator)

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
        beta = self._gates(k, key_padding_mask)
        return delta_dense(unit(q.double()), unit(k), v, beta, None, causal=causal)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        beta = self._gates(k, key_padding_mask)
        return delta_rule(q, k, v, beta, None, causal=causal)

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
        beta = self._gates(keys, None)
        after, out = chunked_scan(queries, keys, values, beta=beta, state=memory, final_state=True, unit=True)
        assert after is not None
        return ScanState(after), out.to(q.dtype)

    def _gates(self, k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """beta, zero at padding."""
        return masked_tokens(self.step_size(k).squeeze(-1).sigmoid(), key_padding_mask)
