"""Attention from random features of either sign: sums over keys first, and a normalizer held above its own noise.

    out_i = sum_j <f(x_i), f(y_j)> v_j / max(g_i, sum_j <f(x_i), f(y_j)>),   j <= i if causal,
    g_i = |f(x_i)| |F_i| / sqrt(r),   F_i = sum_j f(y_j),   f in R^r.

An unbiased estimate of a positive row sum may be zero or negative, and a ratio with it in the denominator has no
moments. g_i is the standard deviation of <f(x_i), F_i> if the directions of the two had nothing in common. A row whose
sum exceeds it is divided by its sum and adds up to one; where there is more noise than signal the row is divided by
g_i instead and adds up to less, down to -sqrt(r) at worst. g_i falls like r^{-1/2} against a row sum that does not, so
that no row is held once there are enough features. Leading coordinates without noise (`exact`) do not count in g_i.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.linalg.polynomial_features import with_ones
from attnlens.linalg.scan import chunked_scan


def noise_floor(
    f_x: Float[Tensor, "b h n r"], total: Float[Tensor, "b h #n r"], exact: int = 0
) -> Float[Tensor, "b h n"]:
    """g_i, `total` the sum F_i of f(y_j) over the keys that row i sees; the first `exact` coordinates left out."""
    random_x, random_total = f_x[..., exact:], total[..., exact:]
    return random_x.norm(dim=-1) * random_total.norm(dim=-1) * random_x.shape[-1] ** -0.5


def held_ratio(
    f_x: Float[Tensor, "b h n r"],
    sums: Float[Tensor, "b h n dv1"],
    total: Float[Tensor, "b h #n r"],
    exact: int = 0,
) -> Float[Tensor, "b h n dv"]:
    """The output from the sums of [v, 1]; zero where a row saw nothing."""
    held = sums[..., -1].maximum(noise_floor(f_x, total, exact))
    empty = held == 0
    return (sums[..., :-1] / torch.where(empty, 1, held)[..., None]).masked_fill(empty[..., None], 0)


def all_sums(
    f_x: Float[Tensor, "b h n r"], f_y: Float[Tensor, "b h m r"], v: Float[Tensor, "b h m dv"]
) -> tuple[Float[Tensor, "b h n dv1"], Float[Tensor, "b h 1 r"]]:
    """Sums of [v, 1] and of f(y) over all keys; a padded key has zero features."""
    return f_x @ (f_y.mT @ with_ones(v)), f_y.sum(2, keepdim=True)


def causal_sums(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h n r"],
    v: Float[Tensor, "b h n dv"],
    *,
    log_decay: Float[Tensor, "b h n"] | None = None,
    past: Float[Tensor, "b h r dv1"] | None = None,
    final_state: bool = False,
) -> tuple[Float[Tensor, "b h r dv1"] | None, Float[Tensor, "b h n dv1"], Float[Tensor, "b h n r"]]:
    """The moment sum_j f(y_j) [v_j, 1]^T after the last token where asked for; the sums over the keys up to each query
    and those in `past`, which shrink by `log_decay` <= 0 before each token."""
    moment, sums = chunked_scan(f_x, f_y, with_ones(v), log_decay=log_decay, state=past, final_state=final_state)
    before = None if past is None else past[..., -1][:, :, None]
    if log_decay is None:
        total = f_y.cumsum(2)
        return moment, sums, total if before is None else total + before
    ones = torch.ones_like(f_y[..., :1])
    return moment, sums, chunked_scan(ones, ones, f_y, log_decay=log_decay, state=before)[1]


def signed_attention(
    f_x: Float[Tensor, "b h n r"],
    f_y: Float[Tensor, "b h m r"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    exact: int = 0,
) -> Float[Tensor, "b h n dv"]:
    """The output of the module docstring; a padded key has zero features."""
    sums, total = causal_sums(f_x, f_y, v)[1:] if causal else all_sums(f_x, f_y, v)
    return held_ratio(f_x, sums, total, exact)


def held_rows(
    f_x: Float[Tensor, "b h n r"], f_y: Float[Tensor, "b h m r"], *, causal: bool, exact: int = 0
) -> Bool[Tensor, "b h n"]:
    """Which rows are divided by g_i in place of their sum: where the estimate has more noise than signal."""
    total = f_y.cumsum(2) if causal else f_y.sum(2, keepdim=True)
    return (f_x * total).sum(-1) < noise_floor(f_x, total, exact)
