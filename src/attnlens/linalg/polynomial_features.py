"""Sums over keys of a kernel of finitely many features, signed or self-tensored, and their causal form by chunks.

    sums_i = sum_j <f(q_i), f(k_j)> [v_j, 1],

S = sum_j f(k_j) [v_j, 1]^T first: time O(n m dv) for m features. Self-tensored features of phi in R^r are all products
phi_a phi_b, a <= b, those with a < b times sqrt(2): r (r + 1)/2 numbers with <f(x), f(y)> = <phi(x), phi(y)>^2 >= 0.

Unlike the sums of `prefix` these are not normalized. In the causal form here another kernel stands in for the features
near the diagonal; without one, `scan.chunked_scan` of [v, 1] is the causal form.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def self_tensored(phi: Float[Tensor, "b h n r"]) -> Float[Tensor, "b h n m"]:
    """The r (r + 1)/2 distinct products of pairs of entries, scaled to give squared inner products."""
    r = phi.shape[-1]
    left, right = torch.triu_indices(r, r, device=phi.device)
    # In the precision of phi: `where` of two Python numbers is float32.
    scale = 1 + (2**0.5 - 1) * (left != right).to(phi.dtype)
    return phi[..., left] * phi[..., right] * scale


def with_ones(v: Float[Tensor, "b h n dv"]) -> Float[Tensor, "b h n dv1"]:
    """[v, 1]: the last column of the sums is then the mass."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def kernel_sums(
    f_q: Float[Tensor, "b h n m"], f_k: Float[Tensor, "b h l m"], v: Float[Tensor, "b h l dv"]
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Numerator and mass of every query over all keys; a padded key has zero features."""
    sums = f_q @ (f_k.mT @ with_ones(v))
    return sums[..., :-1], sums[..., -1]


def causal_kernel_sums(
    f_q: Float[Tensor, "b h n m"],
    f_k: Float[Tensor, "b h n m"],
    v: Float[Tensor, "b h n dv"],
    within: Sequence[Float[Tensor, "b h _ _"]],
    chunk: int,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Numerator and mass over the keys up to each query: by `within`, a kernel matrix for every chunk of which the
    lower triangle is read, on the keys of the same chunk; by features on those before."""
    outs, moment = [], None
    # `split`, not slices in a loop: the gradient of a slice has the length of the whole.
    parts = zip(within, *(x.split(chunk, 2) for x in (f_q, f_k, with_ones(v))), strict=True)
    for kernel, queries, keys, values in parts:
        sums = kernel.tril() @ values
        outs.append(sums if moment is None else sums + queries @ moment)
        fresh = keys.mT @ values
        moment = fresh if moment is None else moment + fresh
    total = torch.cat(outs, 2)
    return total[..., :-1], total[..., -1]
