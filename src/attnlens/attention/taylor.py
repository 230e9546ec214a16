"""Taylor attention: the exponential of softmax attention replaced by its Taylor polynomial of degree two.

    out_i = sum_j p(s <q_i, k_j>) v_j / sum_j p(s <q_i, k_j>),   p(x) = 1 + x + x^2/2 = (1 + (1 + x)^2)/2 >= 1/2,

over j <= i if causal, s = 1/sqrt(d). The kernel has F = 1 + d + d(d + 1)/2 features, with x scaled by d^{-1/4},

    f(x) = (1, x_a, x_a^2/sqrt(2), x_a x_b (a < b)),   <f(x), f(y)> = p(<x, y>).

Time O(n F dv) once n > F (2 F if causal), below that O(n^2 (d + dv)) from the pairs, which are then cheaper; memory
O(n d + F dv) and a chunk's features or pairs, or all of them under autograd; a causal state of F (dv + 1) numbers. An
attention of its own, with its definition in float64 as target; no query weighs a key less than 1/2. As logits shrink it
tends to softmax: with g(x) = log p(x) - x, which decreases, every row is within tanh((g(min) - g(max))/4) of softmax in
total variation, min and max over its logits; that is O(|x|^3), see docs/recurrent.md.

Sources: "Simple linear attention language models balance the recall-throughput tradeoff" (Arora et al., 2024),
https://arxiv.org/abs/2402.18668; "The Hedgehog & the Porcupine" (Zhang et al., 2024), https://arxiv.org/abs/2402.04347.

Departures from the papers. x_a x_b and x_b x_a are one feature, not two: 153 for d = 16, where the full outer product
has 273. Queries and keys keep the head's size; the paper projects them to 16. Pairs within a chunk are not computed by
way of features.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.decay import masked_tokens
from attnlens.linalg.prefix import PrefixState, empty_prefix, normalized

CHUNK = 256


def num_features(dim: int) -> int:
    """1 + d + d(d + 1)/2."""
    return 1 + dim + dim * (dim + 1) // 2


def polynomial(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """p, without the cancellation that its monomials have near -sqrt(2)."""
    return (1 + x).square() / 2 + 0.5


def taylor_features(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch F"]:
    """f of the module docstring; x is already scaled by d^{-1/4}."""
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() * 2**-0.5, x[..., first] * x[..., second]], -1)


def taylor_pairs(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The definition, a block of queries at a time; in float64 when given float64."""
    outs, stop = [], 0
    # Short blocks where the upper half of a block is wasted, but no more than four over a short input.
    for queries in x.split(max(16, min(CHUNK, -(-x.shape[2] // 4))) if causal else CHUNK, 2):
        start, stop = stop, stop + queries.shape[2]
        last = stop if causal else y.shape[2]
        weights = polynomial(queries @ y[:, :, :last].mT)
        if key_padding_mask is not None:
            weights = torch.where(key_padding_mask[:, None, None, :last], weights, 0)
        weights = weights.tril(start) if causal else weights
        outs.append(normalized(weights @ v[:, :, :last], weights.sum(-1)))
    return torch.cat(outs, 2)


def taylor_bidirectional(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Every query over every real key, by features of a chunk at a time."""
    seen = masked_tokens(torch.ones_like(v[..., :1]), key_padding_mask)
    values = torch.cat([v, seen], -1)
    # A padded key has the feature 1; its value, the column of ones included, is zero.
    state = values.new_zeros(*y.shape[:2], num_features(y.shape[3]), values.shape[3])
    for keys, part in zip(y.split(CHUNK, 2), values.split(CHUNK, 2), strict=True):
        state = state + taylor_features(keys).mT @ part
    out = torch.cat([taylor_features(queries) @ state for queries in x.split(CHUNK, 2)], 2)
    return normalized(out[..., :-1], out[..., -1])


def taylor_causal(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    key_padding_mask: Bool[Tensor, "b n"] | None = None,
    state: PrefixState | None = None,
    final_state: bool = False,
) -> tuple[PrefixState | None, Float[Tensor, "b h n dv"]]:
    """Every query over the keys up to its own and those in `state`: pairs within a chunk, features across chunks."""
    values = torch.cat([v, masked_tokens(torch.ones_like(v[..., :1]), key_padding_mask)], -1)
    past = None if state is None else torch.cat([state.moment, state.mass[..., None]], -1)
    outs, parts = [], list(zip(*(t.split(CHUNK, 2) for t in (x, y, values)), strict=True))
    for index, (queries, keys, part) in enumerate(parts):
        out = polynomial(queries @ keys.mT).tril() @ part
        outs.append(out if past is None else out + taylor_features(queries) @ past)
        if final_state or index < len(parts) - 1:
            fresh = taylor_features(keys).mT @ part
            past = fresh if past is None else past + fresh
    out = torch.cat(outs, 2)
    after = PrefixState(past[..., :-1], past[..., -1]) if final_state and past is not None else None
    return after, normalized(out[..., :-1], out[..., -1])


class Taylor(AbstractRecurrentAttention):
    """Kernel attention with the second Taylor polynomial of the exponential; no parameter, no draw."""

    family = "kernel"
    target = "itself"
    row_stochastic = True

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
        k, v = (masked_tokens(t.double(), key_padding_mask) for t in (k, v))
        weights = polynomial(q.double() @ k.mT * q.shape[-1] ** -0.5)
        weights = masked_tokens(weights.mT, key_padding_mask).mT
        weights = weights.tril() if causal else weights
        return normalized(weights @ v, weights.sum(-1))

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        x, y = _scaled(q, k)
        # A pair costs 2 (d + dv), a feature 4 dv: by d = dv as many pairs a query as features are the break-even.
        if k.shape[2] <= num_features(k.shape[3]) * (2 if causal else 1):
            return taylor_pairs(x, y, v, causal=causal, key_padding_mask=key_padding_mask)
        if causal:
            return taylor_causal(x, y, v, key_padding_mask)[1]
        return taylor_bidirectional(x, y, v, key_padding_mask)

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> PrefixState:
        """Empty sums."""
        return empty_prefix(batch, num_heads, num_features(head_dim), value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[PrefixState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n F dv), whatever came before."""
        past = PrefixState(*state)
        x, y = _scaled(q.to(past.mass.dtype), k.to(past.mass.dtype))
        after, out = taylor_causal(x, y, v.to(past.mass.dtype), state=past, final_state=True)
        assert after is not None
        return after, out.to(q.dtype)


def _scaled(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25
