"""Multi-head to collaborative attention: a canonical polyadic decomposition of the heads' products of maps.

    X_h = W^Q_h W^K_h^T,   X_h ~ W~_Q diag(m_h) W~_K^T   for all heads,   by alternating least squares of TensorLy,

started from the maps of all heads side by side, whose R = H d_head columns reproduce X exactly; for smaller R the
start keeps the columns of largest |w_q| |w_k|. A query bias becomes a score of each token, v_h = W^K_h b^Q_h, which is
exact; a key bias shifts whole rows of scores, which softmax does not see.

Source: "Multi-head attention: collaborate instead of concatenate" (Cordonnier, Loukas, Jaggi, 2020),
https://arxiv.org/abs/2006.16362.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.conversion.base import Converted, heads, linears, multihead, put, ranked, with_projections
from attnlens.models.base import AbstractStack
from attnlens.projection.collaborative import Collaborative
from attnlens.projection.multihead import AbstractMultiHead

Factors = tuple[Tensor, Tensor, Tensor]


def start(query: Float[Tensor, "h w d"], key: Float[Tensor, "h w d"], rank: int) -> Factors:
    """M, W~_Q, W~_K with `rank` of the columns of all heads, those of the largest norms of their products."""
    h, _, d = query.shape
    columns = [x.transpose(0, 1).flatten(1) for x in (query, key)]
    mixing = torch.eye(h, dtype=query.dtype).repeat_interleave(d, 1)
    size = columns[0].norm(dim=0) * columns[1].norm(dim=0)
    chosen = size.topk(rank).indices.sort().values
    return mixing[:, chosen], columns[0][:, chosen], columns[1][:, chosen]


def decompose(
    query: Float[Tensor, "h w d"], key: Float[Tensor, "h w d"], rank: int, *, iterations: int
) -> tuple[Factors, float]:
    """Factors of the stack of products, and the relative error of what they give, in Frobenius norm."""
    from tensorly.cp_tensor import CPTensor
    from tensorly.decomposition import parafac

    x = query @ key.mT
    factors = start(query, key, rank)
    if rank < query.shape[0] * query.shape[2] and iterations:
        penalty: Any = 1e-9  # a number, whatever its signature says
        initial: Any = CPTensor((None, [factor.numpy() for factor in factors]))
        # Heads that agree give equal columns to start from, and the normal equations would be singular.
        found = parafac(x.numpy(), rank, init=initial, n_iter_max=iterations, tol=1e-7, l2_reg=penalty)
        weights = torch.from_numpy(found.weights)
        mixing, q, k = (torch.from_numpy(factor) for factor in found.factors)
        factors = mixing * weights, q, k
    mixing, q, k = factors
    error = (torch.einsum("hr,ir,jr->hij", mixing, q, k) - x).norm() / x.norm()
    return factors, float(error)


def collaborative(
    model: AbstractStack, rank: int, *, iterations: int = 20, progress: Callable[[str], None] = lambda line: None
) -> Converted:
    """The model with collaborative attention of `rank` shared columns; exact at the width of the heads together.

    Raises:
        ValueError: a `rank` out of range, rotating positions, fewer key than query heads, or projections that cannot be
            converted.
    """

    def change(layer: int, old: AbstractMultiHead) -> Collaborative:
        if old.position is not None:
            raise ValueError(
                f"`model` turns queries and keys by {type(old.position).__name__}, which no fixed product of maps can "
                "follow: convert a model with added positions, or use transmla"
            )
        if old.num_groups != old.num_heads:
            raise ValueError(
                f"`model` has {old.num_groups} key heads for {old.num_heads}: use transmla or mean_pooling"
            )
        ranked(rank, old.width, "where it is exact")
        to_q, to_k, to_v = linears(old)
        query, key = heads(to_q, old.num_heads), heads(to_k, old.num_heads)
        (mixing, q, k), error = decompose(query.double(), key.double(), rank, iterations=iterations)
        progress(f"collaborative: layer {layer}, rank {rank}, error {error:.3f}")
        biased = to_q.bias is not None
        attention = old.attention
        new = Collaborative(attention, old.width, old.num_heads, rank, content_bias=biased, bias=to_v.bias is not None)
        new.to(to_q.weight.dtype)
        put(new.to_query, q.T)
        put(new.key, k.T)
        with torch.no_grad():
            new.mixing.copy_(mixing)
        if new.content is not None:
            bias = to_q.bias.detach().unflatten(0, (old.num_heads, -1))
            put(new.content, torch.einsum("hwd,hd->hw", key, bias))
        put(new.value, to_v.weight.detach(), to_v.bias)
        put(new.output, old.output.weight.detach(), old.output.bias)
        return new

    first = multihead(model.layers[0])
    width, number = first.width, first.num_heads
    share = (2 * rank * width + number * rank) / (2 * width * width)
    content = number * (linears(first)[0].bias is not None)
    return Converted(with_projections(model, change), share, rank + content + width)
