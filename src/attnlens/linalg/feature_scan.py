"""Attention with positive features that are given by their logarithms, streamed over pieces of the sequence.

For log features a_i, b_j in R^m and values v_j,

    out_i = sum_j sum_f e^{a_if + b_jf} v_j / sum_j sum_f e^{a_if + b_jf},   j <= i if causal.

The sums over j come first, feature by feature: time O(n m (d + dv)), memory O(n (d + dv) + m dv), and causal, in pieces
of c tokens, O(n c m) and O(c m) more, O(n m) to a backward pass. Written as two softmax attentions with the features as
m tokens in between,

    l_f = log sum_j e^{b_jf},   o_f = softmax_j(b_jf) v_j,   out_i = softmax_f(a_if + l_f) o_f,

nothing can underflow and rows sum to one to round-off; (o, l) is the causal state. That is the log domain.

**Linear domain.** As they stand, the sums take half as many exponentials and products, but floating point has to hold
e^{b_jf}: its scale is never shared, since a scale that later keys decide would let them push earlier ones out of range.
e^{a_if} may be scaled by token, which cancels. With t_i = max_f a_if - min_f a_if and s_j = max_f b_jf, the weight of a
pair is at least e^{s_j - t_i} after that scaling, and what underflows in it at most m e^{-c}, c the logarithm of the
range: nothing is lost where max t - min s stays well below c, and `num_in_range` asks for .65 c. In float32 c = 88;
positive random features of Gaussian queries and keys at d = 64 have 28 at logits of standard deviation 1, 52 at 3, and
at 10 122, which leaves the range. Causal tokens in range take the linear domain where the host may read values, the
others and what follows them the log domain; not causal, the log domain is two calls of the fused kernel and faster.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.blocks import host_reads_are_free
from attnlens.linalg.partial import partial_attention
from attnlens.linalg.prefix import normalized
from attnlens.linalg.scan import chunk_length


class LogLinear(NamedTuple):
    """Log features that are linear in the token but for its norm: <row_f, q> of a query, and <row_f, k> - |k|^2 / (2
    sqrt(d)) + shift_f of a key. What else the kernel has is the same for all keys of a query and cancels."""

    rows: Float[Tensor, "b h m d"]
    shift: Float[Tensor, "b h m"] | None = None

    def of_queries(self, q: Float[Tensor, "bh n d"]) -> Float[Tensor, "bh n m"]:
        return torch.bmm(q, self.rows.flatten(0, 1).mT)

    def of_keys(self, k: Float[Tensor, "bh n d"]) -> Float[Tensor, "bh n m"]:
        logs = torch.bmm(k, self.rows.flatten(0, 1).mT) - k.square().sum(-1, keepdim=True) * (k.shape[-1] ** -0.5 / 2)
        return logs if self.shift is None else logs + self.shift.flatten(0, 1)[:, None]


class FeatureState(NamedTuple):
    """What the keys and values so far are to later queries: a mean value and a log mass for each feature."""

    values: Float[Tensor, "b h m dv"]
    log_mass: Float[Tensor, "b h m"]


class FeatureSums(NamedTuple):
    """Sums over the keys so far: of features times values, and of features."""

    moment: Float[Tensor, "bh m dv"]
    mass: Float[Tensor, "bh m"]


class Extremes(NamedTuple):
    """Of the tokens so far, over all heads: the largest t_i, and the smallest and the largest s_j."""

    spread: Tensor
    low: Tensor
    high: Tensor


def empty_features(batch: int, num_heads: int, num_features: int, value_dim: int, like: Tensor) -> FeatureState:
    """No key so far: every mass is zero."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    log_mass = torch.full((batch, num_heads, num_features), -torch.inf, dtype=dtype, device=like.device)
    return FeatureState(torch.zeros(*log_mass.shape, value_dim, dtype=dtype, device=like.device), log_mass)


def num_in_range(
    log_x: Float[Tensor, "bh n m"],
    log_y: Float[Tensor, "bh n m"],
    real: Bool[Tensor, "bh n"] | None,
    before: Extremes | None,
) -> tuple[int, Extremes]:
    """How many of these tokens, from the first on, the linear domain holds, and the extremes after the last of all.

    It reads values on the host. A token counts by itself and what came before it, never by what follows. One with a
    NaN is not in range.
    """
    # Not amin: on a CPU it takes thirty times as long as amax.
    top, most, least = log_y.detach().amax(-1), log_x.detach().amax(-1), -(-log_x.detach()).amax(-1)
    low, high = (top, top) if real is None else (top.masked_fill(~real, math.inf), top.masked_fill(~real, -math.inf))
    spread, low, high = (most - least).amax(0), low.amin(0), high.amax(0)
    if before is not None:
        spread, low, high = spread.clamp_min(before.spread), low.clamp_max(before.low), high.clamp_min(before.high)
    spread, low, high = spread.cummax(0).values, low.cummin(0).values, high.cummax(0).values
    capacity = math.log(torch.finfo(log_x.dtype).max)
    held = ((spread - low).clamp_min(spread) <= 0.65 * capacity) & (high <= 0.55 * capacity)
    return int(held.cumprod(0).sum()), Extremes(spread[-1], low[-1], high[-1])


def linear_chunk(
    log_x: Float[Tensor, "bh n m"],
    log_y: Float[Tensor, "bh n m"],
    v: Float[Tensor, "bh n dv"],
    real: Bool[Tensor, "bh n"] | None,
    past: FeatureSums | None,
) -> tuple[Float[Tensor, "bh n dv"], FeatureSums]:
    """The outputs of consecutive tokens over the keys up to their own and those in `past`, and the sums after them."""
    f_x = torch.exp(log_x - log_x.detach().amax(-1, keepdim=True))
    f_y = log_y.exp() if real is None else torch.where(real[..., None], log_y.exp(), 0)
    weights = torch.bmm(f_x, f_y.mT).tril()
    mass = weights.sum(-1)
    if past is None:
        after = FeatureSums(torch.bmm(f_y.mT, v), f_y.sum(-2))
        return normalized(torch.bmm(weights, v), mass), after
    mass = mass + torch.bmm(f_x, past.mass[..., None]).squeeze(-1)
    total = torch.bmm(f_x, past.moment).baddbmm_(weights, v)
    after = FeatureSums(torch.baddbmm(past.moment, f_y.mT, v), past.mass + f_y.sum(-2))
    return normalized(total, mass), after


def log_kernel(
    log_x: Float[Tensor, "bh n m"], log_y: Float[Tensor, "bh n m"]
) -> tuple[Float[Tensor, "bh n n"], Bool[Tensor, "bh n n"]]:
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
    log_x: Float[Tensor, "bh n m"],
    log_y: Float[Tensor, "bh n m"],
    v: Float[Tensor, "bh n dv"],
    real: Bool[Tensor, "bh n"] | None,
) -> tuple[Float[Tensor, "bh n dv"], Float[Tensor, "bh n"]]:
    """The causal output over these tokens alone, and the log of its normalizer; very low where nothing is seen."""
    log_weights, visible = log_kernel(log_x, log_y)
    visible = visible.tril() if real is None else visible.tril() & real[:, None]
    # A finite floor: a row of padding sees nothing, and the gradient of logsumexp there would be NaN.
    log_weights = log_weights.masked_fill(~visible, _floor(v))
    # Not e^{log_weights - lse}: at lse = -400 its rounding alone moves the row sums by 2e-5 in float32.
    weights = torch.softmax(log_weights, -1).masked_fill(~visible, 0)
    return weights @ v, torch.logsumexp(log_weights, -1)


def keys_to_features(
    log_y: Float[Tensor, "bh n m"], v: Float[Tensor, "bh n dv"], real: Bool[Tensor, "bh n"] | None
) -> tuple[Float[Tensor, "bh m dv"], Float[Tensor, "bh m"]]:
    """(o, l) of the module docstring; l very low where no key is real."""
    if real is not None:
        log_y = log_y.masked_fill(~real[..., None], _floor(v))
    return torch.softmax(log_y, -2).mT @ v, torch.logsumexp(log_y, -2)


def features_to_queries(
    log_x: Float[Tensor, "bh n m"], values: Float[Tensor, "bh m dv"], log_mass: Float[Tensor, "bh m"]
) -> tuple[Float[Tensor, "bh n dv"], Float[Tensor, "bh n"]]:
    """The output over the keys in the state and the log of its normalizer."""
    exponent = log_x + log_mass[:, None]
    return torch.softmax(exponent, -1) @ values, torch.logsumexp(exponent, -1)


def causal_features(
    features: LogLinear,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    key_padding_mask: Bool[Tensor, "b n"] | None = None,
    state: FeatureState | None = None,
    final_state: bool = False,
    chunk: int | None = None,
) -> tuple[FeatureState | None, Float[Tensor, "b h n dv"]]:
    """Every query over the keys up to its own and those in `state`; the state after the last token where
    `final_state` asks for it."""
    heads = q.shape[:2]
    pieces = _pieces(q, k, v, key_padding_mask, chunk or chunk_length(q.shape[2]))
    outs: list[Tensor] = []
    extremes, sums = None, None
    linear, past = host_reads_are_free(q) and state is None, None
    if state is not None:
        past = state.values.flatten(0, 1), state.log_mass.flatten(0, 1).clamp_min(_floor(v))
    for index, (q_, k_, v_, real) in enumerate(pieces):
        a, b, held = features.of_queries(q_), features.of_keys(k_), 0
        if linear:
            held, extremes = num_in_range(a, b, real, extremes)
        if held > 0:
            head = a[:, :held], b[:, :held], v_[:, :held], None if real is None else real[:, :held]
            out, sums = linear_chunk(*head, sums)
            outs.append(out)
        if held == a.shape[1]:
            continue
        if linear:
            linear, past = False, None if sums is None else _in_logs(sums)
            sums = None
        a, b, v_, real = a[:, held:], b[:, held:], v_[:, held:], None if real is None else real[:, held:]
        own = within_chunk(a, b, v_, real)
        outs.append(own[0] if past is None else _merged(features_to_queries(a, *past), own)[0])
        if final_state or index < len(pieces) - 1:
            fresh = keys_to_features(b, v_, real)
            past = fresh if past is None else _merged(past, fresh)
    if sums is not None:
        past = _in_logs(sums)
    after = None if past is None or not final_state else FeatureState(*(x.unflatten(0, heads) for x in past))
    return after, torch.cat(outs, 1).unflatten(0, heads)


def bidirectional_features(
    features: LogLinear,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h l d"],
    v: Float[Tensor, "b h l dv"],
    key_padding_mask: Bool[Tensor, "b l"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Every query over every real key: the two softmax attentions of the log domain, each by the fused kernel."""
    # |k|^2/2 goes in as a coordinate: the `bias` of partial_attention receives no gradient.
    norms = k.square().sum(-1, keepdim=True) * (-(k.shape[-1] ** -0.5) / 2)
    rows = F.pad(features.rows, (0, 1), value=1.0)
    masks = {"key_padding_mask": key_padding_mask, "scale": 1.0}
    values, log_mass = partial_attention(rows, torch.cat([k, norms], -1), v, **masks)
    # An inner product with -inf has no gradient: no key at all enters with a mass of e^{-10^37}.
    log_mass = (log_mass if features.shift is None else log_mass + features.shift).clamp_min(_floor(v))
    keys = torch.cat([features.rows, log_mass[..., None]], -1)
    return partial_attention(F.pad(q, (0, 1), value=1.0), keys, values, scale=1.0)[0]


def _floor(like: Tensor) -> float:
    """The logarithm of no mass: finite, since an infinite one has no gradient in sums of exponentials."""
    return torch.finfo(like.dtype).min / 4


def _in_logs(sums: FeatureSums) -> tuple[Tensor, Tensor]:
    """The same sums as mean values and log masses."""
    empty = sums.mass == 0
    log_mass = torch.where(empty, 1, sums.mass).log().masked_fill(empty, _floor(sums.mass))
    return normalized(sums.moment, sums.mass), log_mass


def _merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Means and log masses over disjoint keys, from those over each part; logarithms are finite."""
    share = torch.sigmoid(second[1] - first[1])[..., None]
    return torch.lerp(first[0], second[0], share), torch.logaddexp(first[1], second[1])


def _pieces(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, size: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """q, k, v and the mask of every head in pieces of the sequence, one batch axis."""
    parts = [x.flatten(0, 1).split(size, 1) for x in (q, k, v)]
    if key_padding_mask is None:
        masks: tuple[Tensor | None, ...] = (None,) * len(parts[1])
    else:
        masks = key_padding_mask.repeat_interleave(q.shape[1], 0).split(size, 1)
    return list(zip(*parts, masks, strict=True))
