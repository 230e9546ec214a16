"""State space duality (Mamba-2): a linear memory with a decay and a step size of each token, by its matrix form.

    S_i = e^{-a_h t_i} S_{i-1} + t_i k_i v_i^T,   out_i = s S_i^T q_i,   t_i = softplus(<w_h, k_i> + b_h),   a_h > 0,

which is a product with a 1-semiseparable mask, out = s (Q K^T . D) diag(t) V, D_ij = e^{-a (t_{j+1} + ... + t_i)} for
j <= i; bidirectional, D_ij = D_ji. In the terms of the paper q = C, k = B, v = x, t = Delta. Time
O(n c (d + dv) + n d dv) in chunks of c <= 64 tokens, memory O(n (d + dv)), a causal state of d dv numbers. An attention
of its own: its target is its definition with the matrix materialized in float64. Row sums are not one.

Source: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality"
(Dao, Gu, 2024), https://arxiv.org/abs/2405.21060.

Departures from the paper. The step size is read from the head's key, not from the token; the scale s = 1/sqrt(d) is
ours; convolution, skip D x, norm and output gate belong to the model. A decay below the smallest normal number counts
as that number. The bidirectional form is ours; with fewer queries than keys, q are the last tokens.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.decay import bounded_decay, decayed_dense, in_both_directions, masked_tokens
from attnlens.linalg.head_map import gaussian_map
from attnlens.linalg.scan import ScanState, chunked_scan, empty_state

STEPS = 1e-3, 1e-1
RATES = 1.0, 16.0


class Ssd(AbstractRecurrentAttention):
    """Mamba-2's mixing of tokens, with learned step sizes and rates.

    Args:
        head_dim: of queries and keys.
        num_heads: every head has its own step size and rate.
        seed: of the initial values, the paper's: t log-uniform between 0.001 and 0.1 at k = 0, a uniform between 1
            and 16; w is N(0, 1/head_dim).
    """

    family = "recurrent"
    target = "itself"

    def __init__(self, head_dim: int, num_heads: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        low, high = (math.log(t) for t in STEPS)
        steps = torch.exp(low + (high - low) * torch.rand(num_heads, 1, 1, generator=generator, device="cpu"))
        inverse_softplus = steps + torch.log(-torch.expm1(-steps))
        self.step_size = gaussian_map(num_heads, head_dim, 1, generator, inverse_softplus)
        low, high = RATES
        rates = low + (high - low) * torch.rand(num_heads, 1, generator=generator, device="cpu")
        self.log_rate = nn.Parameter(rates.log())

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
        q, v, log_decay = self._discretized(q.double(), k, v)
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
        q, v, log_decay = self._discretized(q, k, v)
        log_decay = masked_tokens(log_decay, key_padding_mask)
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
        keys = k.to(memory.dtype)
        queries, values, log_decay = self._discretized(q.to(memory.dtype), keys, v.to(memory.dtype))
        after, out = chunked_scan(queries, keys, values, log_decay=log_decay, state=memory, final_state=True)
        assert after is not None
        return ScanState(after), out.to(q.dtype)

    def _discretized(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s q, t v and the log decays -a t."""
        steps = F.softplus(self.step_size(k).squeeze(-1))
        log_decay = bounded_decay(-self.log_rate.to(k.dtype).exp() * steps)
        return q * q.shape[-1] ** -0.5, steps[..., None] * v, log_decay
