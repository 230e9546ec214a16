"""Landmarks: a few tokens that stand for all, as the means of consecutive segments of each example's real tokens."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Segments(NamedTuple):
    """A partition of each example's real tokens into consecutive segments whose sizes differ by one at most.

    Segment s of an example with n real tokens holds the real tokens of rank floor(s n / l) to floor((s + 1) n / l) - 1,
    where l = min(num_landmarks, n); the segments from l on are empty. It depends on the real tokens alone, never on
    how much padding stands among or after them. Examples share one row (batch 1) where no mask tells them apart.
    `equal`: they are the whole sequence, cut into pieces of one size.
    """

    positions: Int[Tensor, "#b l w"]
    member: Bool[Tensor, "#b l w"]
    equal: bool


def segment(length: int, num_landmarks: int, real: Bool[Tensor, "b m"] | None, device: torch.device) -> Segments:
    """Positions of the members of min(num_landmarks, length) segments, `length` tokens with `real` ones among them."""
    equal = real is None and length % num_landmarks == 0
    if real is None:
        real = torch.ones(1, length, dtype=torch.bool, device=device)
    most = min(num_landmarks, length)
    count = real.sum(-1, keepdim=True)
    filled = count.clamp(1, most)
    edges = torch.arange(most + 1, device=device) * count // filled
    rank = edges[:, :-1, None] + torch.arange(-(-length // most), device=device)
    member = (rank < edges[:, 1:, None]) & (torch.arange(most, device=device) < filled)[..., None]
    order = (~real).to(torch.int8).argsort(dim=-1, stable=True)
    positions = order.gather(1, rank.clamp_max(length - 1).flatten(1)).view_as(rank)
    return Segments(positions, member, equal)


def segment_means(x: Float[Tensor, "b h n d"], segments: Segments) -> Float[Tensor, "b h l d"]:
    """The mean of x over the members of every segment; zero over an empty one."""
    positions, member, equal = segments
    if equal:  # without a gather, which costs more than the sum
        return x.unflatten(2, positions.shape[1:]).mean(3)
    if positions.shape[0] == 1:
        grouped = x.index_select(2, positions.flatten())
    else:
        grouped = x.take_along_dim(positions.flatten(1)[:, None, :, None], 2)
    weights = member.to(x) / member.sum(-1, keepdim=True).clamp_min(1)
    return (grouped.unflatten(2, positions.shape[1:]) * weights[:, None, ..., None]).sum(-2)
