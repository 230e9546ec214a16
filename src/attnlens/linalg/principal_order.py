"""Ordering the points of every cell so that neighbors in the order are near in space: bisection by principal axes.

A cell's points are sorted along the principal axis of their keys and cut in the middle, both halves likewise, until
`group` points are left in a part: log2(p / group) sorts, time O(p (d + log p)) each. Order is constant for the
gradient. Empty points (count 0) weigh nothing in the axes and go last.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

ITERATIONS = 3  # of the power method; a rough axis sorts as well, and the result is a partition in any case


def principal_order(
    keys: Float[Tensor, "bh t p d"], count: Float[Tensor, "#bh t p"], group: int
) -> Int[Tensor, "bh t p"]:
    """The points of each cell in an order whose runs of `group` are compact."""
    keys, count = keys.detach(), count.expand(keys.shape[:3])
    bh, t, p, d = keys.shape
    order = torch.arange(p, device=keys.device).expand(bh, t, p)
    part = p
    while part > group and part % 2 == 0:
        x = keys.gather(2, order[..., None].expand(-1, -1, -1, d)).unflatten(2, (-1, part))
        place = _projection(x, count.gather(2, order).unflatten(2, (-1, part))).argsort(dim=-1, stable=True)
        order = order.unflatten(2, (-1, part)).gather(-1, place).flatten(2)
        part //= 2
    return order


def _projection(x: Float[Tensor, "bh t c p d"], count: Float[Tensor, "bh t c p"]) -> Float[Tensor, "bh t c p"]:
    """Coordinates of the points along the principal axis of their weighted covariance, infinite for empty ones."""
    weights = count / count.sum(-1, keepdim=True).clamp_min(1)
    x = x - (weights[..., None] * x).sum(-2, keepdim=True)
    weighted = weights[..., None] * x
    # The point farthest from the mean is never orthogonal to all of the cloud.
    far = x.square().sum(-1).masked_fill(count == 0, -1).argmax(-1, keepdim=True)
    axis = x.take_along_dim(far[..., None], -2).mT
    for _ in range(ITERATIONS):
        axis = weighted.mT @ (x @ axis)
        axis = axis / axis.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return (x @ axis)[..., 0].masked_fill(count == 0, torch.inf)
