"""Attention from random features of either sign: sums over keys first, and a normalizer held above its own noise.

    out_i = sum_j <f(x_i), f(y_j)> v_j / max(g_i, sum_j <f(x_i), f(y_j)>),   j <= i if causal,
    g_i = |f(x_i)| max(|F_i|, E_i^{1/2}) / sqrt(r),   F_i = sum_j f(y_j),   E_i = sum_j |f(y_j)|^2,   f in R^r.

An unbiased estimate of a positive row sum may be zero or negative, and a ratio with it in the denominator has no
moments. |f(x_i)| |F_i|/sqrt(r) is the standard deviation of the sum <f(x_i), F_i> if the directions of the two had
nothing in common; E_i takes over where the keys' features cancel each other. A row whose sum exceeds g_i is divided by
its sum and adds up to one; where there is more noise than signal it is divided by g_i and adds up to less, down to
-sqrt(r). No output exceeds sqrt(r) sum_j |f(y_j)| |v_j| / E_i^{1/2} <= sqrt(r n) max |v_j|. g_i falls like r^{-1/2}
against a row sum that does not, so that no row is held once there are enough features. Leading coordinates without
noise (`exact`) do not count in g_i.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.linalg.polynomial_features import with_ones
from attnlens.linalg.scan import chunked_scan


class SignedState(NamedTuple):
    """sum_j f(y_j) [v_j, 1]^T and E over the keys so far."""

    moment: Float[Tensor, "b h r dv1"]
    energy: Float[Tensor, "b h"]


class Sums(NamedTuple):
    """Over the keys that each row sees: <f(x_i), f(y_j)> [v_j, 1], F and E."""

    products: Float[Tensor, "b h n dv1"]
    total: Float[Tensor, "b h #n r"]
    energy: Float[Tensor, "b h #n"]


def empty_signed(batch: int, num_heads: int, num_features: int, value_dim: int, like: Tensor) -> SignedState:
    """The sums over no key, on the device of `like` and in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    moment = torch.zeros(batch, num_heads, num_features, value_dim + 1, dtype=dtype, device=like.device)
    return SignedState(moment, moment.new_zeros(batch, num_heads))


def noise_floor(f_x: Float[Tensor, "b h n r"], sums: Sums, exact: int = 0) -> Float[Tensor, "b h n"]:
    """g_i; the first `exact` coordinates left out."""
    random_x, random_total = f_x[..., exact:], sums.total[..., exact:]
    # The root has no gradient at zero, where there is no key.
    spread = (sums.energy + torch.finfo(f_x.dtype).tiny).sqrt()
    return random_x.norm(dim=-1) * random_total.norm(dim=-1).maximum(spread) * random_x.shape[-1] ** -0.5


def held_ratio(f_x: Float[Tensor, "b h n r"], sums: Sums, exact: int = 0) -> Float[Tensor, "b h n dv"]:
    """The output; zero where a row saw nothing."""
    held = sums.products[..., -1].maximum(noise_floor(f_x, sums, exact))
    empty = held == 0
    return (sums.products[..., :-1] / torch.where(empty, 1, held)[..., None]).masked_fill(empty[..., None], 0)


def held_rows(f_x: Float[Tensor, "b h n r"], sums: Sums, exact: int = 0) -> Bool[Tensor, "b h n"]:
    """Which rows are divided by g_i in place of their sum: where the estimate has more noise than signal."""
    return sums.products[..., -1] < noise_floor(f_x, sums, exact)


def all_sums(
    f_x: Float[Tensor, "b h n r"], f_y: Float[Tensor, "b h m r"], v: Float[Tensor, "b h m dv"], exact: int = 0
) -> Sums:
    """Over all keys; a padded key has zero features."""
    energy = f_y[..., exact:].square().sum((-2, -1))[..., None]
    return Sums(f_x @ (f_y.mT @ with_ones(v)), f_y.sum(2, keepdim=True), energy)


def causal_sums(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h n r"],
    v: Float[Tensor, "b h n dv"],
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
    return None if after is None else SignedState(after, energy[..., -1]), Sums(products, total, energy)


def signed_attention(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h m r"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    exact: int = 0,
) -> Float[Tensor, "b h n dv"]:
    """The output of the module docstring; a padded key has zero features."""
    sums = causal_sums(f_x, f_y, v, exact=exact)[1] if causal else all_sums(f_x, f_y, v, exact)
    return held_ratio(f_x, sums, exact)


def _running(x: Tensor, log_decay: Tensor | None, past: Tensor | None) -> Tensor:
    """Sums over the tokens up to each, decayed."""
    before = None if past is None else past[:, :, None]
    if log_decay is None:
        total = x.cumsum(2)
        return total if before is None else total + before
    ones = torch.ones_like(x[..., :1])
    return chunked_scan(ones, ones, x, log_decay=log_decay, state=before)[1]
