"""Performer: softmax attention with the kernel replaced by an unbiased estimate from positive random features (FAVOR+).

    out_i = sum_j <phi(x_i), phi(y_j)> v_j / sum_j <phi(x_i), phi(y_j)>,   x = d^{-1/4} q,   y = d^{-1/4} k,
    phi_f(y) = m^{-1/2} exp(<w_f, y> - |y|^2/2),   w_f ~ N(0, I), orthogonal within blocks of d,   j <= i if causal.

The sums over j are taken first, feature by feature, so time is O(n m d) instead of O(n^2 d); memory is O(n d + m d),
and O(chunk m) more when causal. The kernel estimate is unbiased with relative variance at most
(e^{|x + y|^2} - 1) / m, so that the error falls like m^{-1/2}; it equals softmax attention for no finite m. At
|x + y|^2 >> log m (unit Gaussian queries and keys at d = 64 have 16) it carries no information: see its skill.

Source: "Rethinking Attention with Performers" (Choromanski et al., 2021), https://arxiv.org/abs/2009.14794.

Departures from the paper. Its stabilizer subtracts a maximum over all keys and adds 1e-4 to every feature: the
constant swamps the features (the output becomes mean(V)) and the maximum lets the future into causal outputs. Nothing
is added here, and everything is evaluated in the log domain, feature by feature:

    l_f = log sum_j e^{<w_f, y_j> - |y_j|^2/2},   o_f = softmax_j(<w_f, y_j> - |y_j|^2/2) v_j,
    out_i = softmax_f(<w_f, x_i> + l_f) o_f,

which is the same ratio written as two softmax attentions, with the features as m tokens in between. Neither can
underflow, rows sum to one to round-off, and (o, l) is the causal state.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.blocks import host_reads_are_free
from attnlens.linalg.feature_scan import FeatureSums, linear_chunk, num_in_range
from attnlens.linalg.partial import merge, partial_attention
from attnlens.linalg.prefix import normalized
from attnlens.linalg.random_features import gaussian_projections, positive_log_features
from attnlens.linalg.scan import chunk_length


class PerformerState(NamedTuple):
    """What the keys and values so far are to later queries: a mean value and a log mass for each feature."""

    values: Float[Tensor, "b h m dv"]
    log_mass: Float[Tensor, "b h m"]


def keys_to_features(
    y: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    projections: Float[Tensor, "b h m d"],
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> PerformerState:
    """(o, l) of the module docstring; l = -inf where no key is real."""
    # |y|^2/2 goes in as a coordinate: the `bias` of partial_attention receives no gradient.
    keys = torch.cat([y, -y.square().sum(-1, keepdim=True) / 2], -1)
    queries = torch.cat([projections, torch.ones_like(projections[..., :1])], -1)
    return PerformerState(*partial_attention(queries, keys, v, key_padding_mask=key_padding_mask, scale=1.0))


def features_to_queries(
    x: Float[Tensor, "b h n d"], projections: Float[Tensor, "b h m d"], state: PerformerState
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """The output over the keys in `state` and the log of its normalizer (up to |x|^2/2, which cancels)."""
    # An inner product with -inf has no gradient: an empty state enters with a mass of e^{-10^37}.
    log_mass = state.log_mass.clamp_min(torch.finfo(x.dtype).min / 4)
    keys = torch.cat([projections, log_mass[..., None]], -1)
    queries = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    return partial_attention(queries, keys, state.values, scale=1.0)


def log_kernel(
    log_x: Float[Tensor, "b h n m"], log_y: Float[Tensor, "b h n m"]
) -> tuple[Float[Tensor, "b h n n"], Bool[Tensor, "b h n n"]]:
    """log sum_f e^{log_x_if + log_y_jf} by a matrix product, and where the result can be relied on.

    Each token's features are scaled so that the largest is e^c, with m e^{2c} just below overflow (c = 41 in float32):
    the scales are per token and never shared, so that no token pushes another one out of range. An entry below e^{-c},
    that is e^{-3c} of the largest possible, is not relied on: there its gradient would overflow. The diagonal is summed
    in the log domain and always reliable, so that every row sees its own key at least.
    """
    c = (math.log(torch.finfo(log_x.dtype).max) - math.log(log_x.shape[-1])) / 2 - 1
    top_x, top_y = log_x.detach().amax(-1, keepdim=True), log_y.detach().amax(-1, keepdim=True)
    estimate = torch.exp(log_x - top_x + c) @ torch.exp(log_y - top_y + c).mT
    own = torch.eye(log_x.shape[-2], dtype=torch.bool, device=log_x.device)
    reliable = estimate > math.exp(-c)
    log_estimate = torch.where(reliable, estimate, 1).log() + top_x + top_y.mT - 2 * c
    log_own = torch.logsumexp(log_x + log_y, -1, keepdim=True)
    return torch.where(own, log_own, log_estimate), reliable | own


def within_chunk(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    projections: Float[Tensor, "b h m d"],
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """The causal output over these tokens alone, and the log of its normalizer as `features_to_queries` has it."""
    log_x, log_y = x @ projections.mT, positive_log_features(y, projections)
    log_weights, visible = log_kernel(log_x, log_y + math.log(projections.shape[-2]) / 2)
    visible = visible.tril()
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    # A finite floor: a row of padding sees nothing, and the gradient of logsumexp there would be NaN.
    log_weights = log_weights.masked_fill(~visible, torch.finfo(x.dtype).min / 4)
    # Not e^{log_weights - lse}: at lse = -400 its rounding alone moves the row sums by 2e-5 in float32.
    weights = torch.softmax(log_weights, -1).masked_fill(~visible, 0)
    return weights @ v, torch.logsumexp(log_weights, -1).masked_fill(~visible.any(-1), -torch.inf)


def bidirectional_performer(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    projections: Float[Tensor, "b h f d"],
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Every query over every real key."""
    return features_to_queries(x, projections, keys_to_features(y, v, projections, key_padding_mask))[0]


def linear_chunks(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    projections: Float[Tensor, "b h m d"],
    key_padding_mask: Bool[Tensor, "b n"] | None,
    chunk: int,
    outs: list[Tensor],
) -> tuple[int, FeatureSums | None]:
    """Chunks in the linear domain, their outputs appended to `outs`, up to the first token that leaves its range: the
    position of that one, and the sums before it."""
    sums, extremes, w = None, None, projections.flatten(0, 1).mT
    splits = [t.flatten(0, 1).split(chunk, 1) for t in (x, y, v)]
    for index, (x_, y_, v_) in enumerate(zip(*splits, strict=True)):
        real = None
        if key_padding_mask is not None:
            real = key_padding_mask[:, index * chunk : (index + 1) * chunk].repeat_interleave(x.shape[1], 0)
        log_x, log_y = torch.bmm(x_, w), torch.bmm(y_, w) - y_.square().sum(-1, keepdim=True) / 2
        held, extremes = num_in_range(log_x, log_y, real, extremes)
        if held > 0:
            real = None if real is None else real[:, :held]
            out, sums = linear_chunk(log_x[:, :held], log_y[:, :held], v_[:, :held], real, sums)
            outs.append(out.unflatten(0, x.shape[:2]))
        if held < log_x.shape[1]:
            return index * chunk + held, sums
    return x.shape[2], sums


def as_state(sums: FeatureSums, heads: torch.Size) -> PerformerState:
    """The same sums as mean values and log masses."""
    values = normalized(sums.moment, sums.mass)
    return PerformerState(values.unflatten(0, heads), sums.mass.log().unflatten(0, heads))


def causal_performer(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    projections: Float[Tensor, "b h m d"],
    key_padding_mask: Bool[Tensor, "b n"] | None = None,
    state: PerformerState | None = None,
    final_state: bool = False,
    chunk: int | None = None,
) -> tuple[PerformerState | None, Float[Tensor, "b h n dv"]]:
    """Every query over the keys up to its own and those in `state`, chunk by chunk; the state after the last token
    where `final_state` asks for it."""
    outs, n = [], x.shape[2]
    chunk = chunk_length(n) if chunk is None else chunk
    done = 0
    if host_reads_are_free(x) and state is None:
        done, sums = linear_chunks(x, y, v, projections, key_padding_mask, chunk, outs)
        state = None if sums is None else as_state(sums, x.shape[:2])
    for start in range(done, n, chunk):
        part = slice(start, start + chunk)
        mask = None if key_padding_mask is None else key_padding_mask[:, part]
        own = within_chunk(x[:, :, part], y[:, :, part], v[:, :, part], projections, mask)
        past = () if state is None else (features_to_queries(x[:, :, part], projections, state),)
        outs.append(merge(*past, own)[0] if past else own[0])
        if final_state or start + chunk < n:
            fresh = keys_to_features(y[:, :, part], v[:, :, part], projections, mask)
            state = fresh if state is None else PerformerState(*merge(state, fresh))
    return state, torch.cat(outs, 2)


class Performer(AbstractRecurrentAttention):
    """FAVOR+ with its own draw for every head.

    Args:
        num_features: random features m, at least 1; multiples of `head_dim` fill their orthogonal blocks.
        head_dim: of queries and keys.
        num_heads: every head has its own draw.
        seed: of the draws.
        orthogonal: orthogonal within blocks of `head_dim` features instead of independent.
    """

    family = "random features"
    budget = "num_features"
    row_stochastic = True
    order = 0.5
    unbiased = True

    def __init__(self, num_features: int, head_dim: int, num_heads: int, seed: int, orthogonal: bool = True) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"`num_features` must be at least 1, got {num_features}; multiples of head_dim are best")
        generator = torch.Generator().manual_seed(seed)
        draws = [
            gaussian_projections(num_features, head_dim, orthogonal=orthogonal, generator=generator)
            for _ in range(num_heads)
        ]
        self.projections: Tensor
        self.register_buffer("projections", torch.stack(draws).float())

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        x, y, projections = self._scaled(q, k)
        if causal:
            return causal_performer(x, y, v, projections, key_padding_mask)[1]
        return bidirectional_performer(x, y, v, projections, key_padding_mask)

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """<phi(x_i), phi(y_j)>, the estimate of exp(<q_i, k_j>/sqrt(d))."""
        x, y, projections = self._scaled(q, k)
        return positive_log_features(x, projections).exp() @ positive_log_features(y, projections).exp().mT

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> PerformerState:
        """No key so far: every mass is zero."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        log_mass = torch.full(
            (batch, num_heads, self.projections.shape[1]), -torch.inf, dtype=dtype, device=like.device
        )
        return PerformerState(torch.zeros(*log_mass.shape, value_dim, dtype=dtype, device=like.device), log_mass)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[PerformerState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n m d), whatever came before."""
        past = PerformerState(*state)
        dtype = past.log_mass.dtype
        x, y, projections = self._scaled(q.to(dtype), k.to(dtype))
        after, out = causal_performer(x, y, v.to(dtype), projections, state=past, final_state=True)
        assert after is not None
        return after, out.to(q.dtype)

    def _scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and the draws of every head, in the precision of q."""
        num_heads, _, head_dim = self.projections.shape
        if (q.shape[1], q.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`q` has {q.shape[1]} heads of {q.shape[3]}, but the draws are for {num_heads} heads of {head_dim}: "
                "build with the `num_heads` and `head_dim` of the input"
            )
        scale = q.shape[-1] ** -0.25
        return q * scale, k * scale, self.projections.to(q.dtype).expand(q.shape[0], -1, -1, -1)
