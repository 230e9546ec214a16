"""Attention from random features of either sign: sums over keys first, and a normalizer held above its own noise.

    out_i = a_i + sum_j <f(x_i), f(y_j)> (v_j - a_i) / max(g_i, sum_j <f(x_i), f(y_j)>),   j <= i if causal,
    g_i = c |f(x_i)| max(|F_i|, E_i^{1/2}) / sqrt(r),   F_i = sum_j f(y_j),   E_i = sum_j |f(y_j)|^2,   f in R^r,

a_i the mean of the values that row i sees. An unbiased estimate of a positive row sum may be zero or negative, and a
ratio with it in the denominator has no moments. |f(x_i)| |F_i|/sqrt(r) is the standard deviation of <f(x_i), F_i> if
the directions of the two had nothing in common; E_i takes over where the features of the keys cancel each other, and
c = `CAUTION` is a heuristic. A row whose sum exceeds g_i is the plain ratio of sums. Elsewhere there is more noise than
signal: the sum is taken as g_i, what it lacks is spread over all keys alike, and the row is drawn to a_i. Every row
adds up to one, and no output is further than sqrt(r)/c sum_j |f(y_j)| |v_j - a_i| / E_i^{1/2} from a_i. g_i falls like
r^{-1/2} against a row sum that does not: no row is held once there are enough features. Leading coordinates without
noise (`exact`) do not count in g_i, and with them the bound is not promised.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.linalg.dense import mean_values
from attnlens.linalg.polynomial_features import with_ones
from attnlens.linalg.scan import chunked_scan

CAUTION = 3.0


class SignedState(NamedTuple):
    """sum_j f(y_j) [v_j, 1]^T, E, and sum_j [v_j, 1] over the keys so far."""

    moment: Float[Tensor, "b h r dv1"]
    energy: Float[Tensor, "b h"]
    values: Float[Tensor, "b h dv1"]


class Sums(NamedTuple):
    """Over the keys that each row sees: <f(x_i), f(y_j)> [v_j, 1], F, E, and the mean of v_j."""

    products: Float[Tensor, "b h n dv1"]
    total: Float[Tensor, "b h #n r"]
    energy: Float[Tensor, "b h #n"]
    mean: Float[Tensor, "b h #n dv"]


def empty_signed(batch: int, num_heads: int, num_features: int, value_dim: int, like: Tensor) -> SignedState:
    """The sums over no key, on the device of `like` and in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    moment = torch.zeros(batch, num_heads, num_features, value_dim + 1, dtype=dtype, device=like.device)
    return SignedState(moment, moment.new_zeros(batch, num_heads), moment.new_zeros(batch, num_heads, value_dim + 1))


def noise_floor(f_x: Float[Tensor, "b h n r"], sums: Sums, exact: int = 0) -> Float[Tensor, "b h n"]:
    """g_i; the first `exact` coordinates left out."""
    random_x, random_total = f_x[..., exact:], sums.total[..., exact:]
    # The root has no gradient at zero, where there is no key.
    spread = (sums.energy + torch.finfo(f_x.dtype).tiny).sqrt()
    return random_x.norm(dim=-1) * random_total.norm(dim=-1).maximum(spread) * (CAUTION * random_x.shape[-1] ** -0.5)


def held_ratio(f_x: Float[Tensor, "b h n r"], sums: Sums, exact: int = 0) -> Float[Tensor, "b h n dv"]:
    """The output; zero where a row saw nothing."""
    mass = sums.products[..., -1:]
    held = mass.maximum(noise_floor(f_x, sums, exact)[..., None])
    return sums.mean + (sums.products[..., :-1] - mass * sums.mean) / torch.where(held == 0, 1, held)


def held_rows(f_x: Float[Tensor, "b h n r"], sums: Sums, exact: int = 0) -> Bool[Tensor, "b h n"]:
    """Which rows are divided by g_i in place of their sum, and drawn to the mean."""
    return sums.products[..., -1] < noise_floor(f_x, sums, exact)


def all_sums(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h m r"],
    v: Float[Tensor, "b h m dv"],
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
    exact: int = 0,
) -> Sums:
    """Over all keys; a padded key has zero features and a zero value."""
    energy = f_y[..., exact:].square().sum((-2, -1))[..., None]
    mean = mean_values(v, causal=False, key_padding_mask=key_padding_mask)
    return Sums(f_x @ (f_y.mT @ with_ones(v)), f_y.sum(2, keepdim=True), energy, mean)


def causal_sums(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h n r"],
    v: Float[Tensor, "b h n dv"],
    key_padding_mask: Bool[Tensor, "b n"] | None = None,
    *,
    log_decay: Float[Tensor, "b h n"] | None = None,
    past: SignedState | None = None,
    final_state: bool = False,
    exact: int = 0,
) -> tuple[SignedState | None, Sums]:
    """Over the keys up to each query and those in `past`; the state after the last token where asked for. Before each
    token features so far shrink by e^{log_decay} <= 1."""
    moment = None if past is None else past.moment
    after, products = chunked_scan(f_x, f_y, with_ones(v), log_decay=log_decay, state=moment, final_state=final_state)
    total = _running(f_y, log_decay, None if moment is None else moment[..., -1])
    squares = f_y[..., exact:].square().sum(-1, keepdim=True)
    twice = None if log_decay is None else 2 * log_decay
    energy = _running(squares, twice, None if past is None else past.energy[..., None]).squeeze(-1)
    counted = with_ones(v)
    if key_padding_mask is not None:
        counted = torch.where(key_padding_mask[:, None, :, None], counted, 0)
    values = _running(counted, None, None if past is None else past.values)
    mean = values[..., :-1] / values[..., -1:].clamp_min(1)
    state = None if after is None else SignedState(after, energy[..., -1], values[:, :, -1])
    return state, Sums(products, total, energy, mean)


def signed_attention(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h m r"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
    exact: int = 0,
) -> Float[Tensor, "b h n dv"]:
    """The output of the module docstring; a padded key has zero features and a zero value."""
    sums = (
        causal_sums(f_x, f_y, v, key_padding_mask, exact=exact)[1]
        if causal
        else all_sums(f_x, f_y, v, key_padding_mask, exact)
    )
    return held_ratio(f_x, sums, exact)


def _running(x: Tensor, log_decay: Tensor | None, past: Tensor | None) -> Tensor:
    """Sums over the tokens up to each, decayed."""
    before = None if past is None else past[:, :, None]
    if log_decay is None:
        total = x.cumsum(2)
        return total if before is None else total + before
    ones = torch.ones_like(x[..., :1])
    return chunked_scan(ones, ones, x, log_decay=log_decay, state=before)[1]
