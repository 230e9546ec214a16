"""The delta rule: a memory that corrects what it holds for a key instead of adding to it, with or without decay.

    S_i = a_i S_{i-1} + beta_i k_i (v_i - a_i S_{i-1}^T k_i)^T,   |k_i| = 1,   0 <= beta_i <= 1,   0 < a_i <= 1,

a step of size beta_i of gradient descent on |S^T k_i - v_i|^2 / 2. Since I - beta k k^T is a contraction,
|S_n| <= sum_i beta_i |v_i|: nothing grows. With D_ij = a_{j+1} ... a_i, all tokens at once,

    (I + tril(diag(beta) K K^T . D, -1)) U = diag(beta) V,   S_n = K^T diag(D_n) U,   causal out = (Q K^T . D) U.

The bidirectional form reads the state after the last token with every query, Q S_n: an order of the tokens is what the
rule is about, and this is what decoding with one query over the keys so far gives.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.linalg.blocks import in_pieces
from attnlens.linalg.scan import chunked_scan


def unit(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    """x / |x|; zero, which is what padding holds, stays zero."""
    return in_pieces(lambda rows: F.normalize(rows, dim=-1), x)


def delta_dense(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    beta: Float[Tensor, "b h m"],
    log_decay: Float[Tensor, "b h m"] | None,
    *,
    causal: bool,
) -> Float[Tensor, "b h n dv"]:
    """The equations of the module docstring, with one linear system for the whole sequence."""
    total = torch.zeros_like(beta) if log_decay is None else log_decay.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    system = (beta[..., None] * k) @ k.mT * decay
    written = torch.linalg.solve_triangular(system, beta[..., None] * v, upper=False, unitriangular=True)
    return (q @ k.mT * (decay if causal else decay[..., -1:, :])) @ written


def delta_rule(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    beta: Float[Tensor, "b h m"],
    log_decay: Float[Tensor, "b h m"] | None,
    *,
    causal: bool,
) -> Float[Tensor, "b h n dv"]:
    """The same by chunks, of q and k scaled to unit length."""
    if causal:
        return chunked_scan(q, k, v, log_decay=log_decay, beta=beta, unit=True)[1]
    # No query asks on the way. Not `k` twice: the compiler takes no tensor for two arguments.
    memory, _ = chunked_scan(torch.zeros_like(k), k, v, log_decay=log_decay, beta=beta, final_state=True, unit=True)
    assert memory is not None
    return unit(q) @ memory
