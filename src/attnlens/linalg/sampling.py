"""Attention to one block of keys exactly and to all others by a uniform sample.

A uniform subset S of c keys holds key j with probability |S| / c, so that for every row

    E sum_{j in S, j not in B} (c / |S|) e^{s_j} = sum_{j not in B} e^{s_j},

whatever the block B, as long as it was chosen without looking at S: given the blocks, row sums are unbiased.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.blocks import take_rows
from attnlens.linalg.partial import partial_attention


def uniform_sample(
    priority: Int[Tensor, "1 h c"], size: int, mask: Bool[Tensor, "b #h c"] | None, like: Float[Tensor, "b h c d"]
) -> tuple[Int[Tensor, "b h l"], Float[Tensor, "b h l"]]:
    """The real keys with the smallest priorities, and the log of how many keys each stands for; -inf for padding."""
    c, taken = priority.shape[-1], min(size, priority.shape[-1])
    if mask is None:
        sample = priority.topk(taken, largest=False).indices.expand(like.shape[0], -1, -1)
        return sample, torch.full(sample.shape, c / taken, dtype=like.dtype, device=like.device).log()
    sample = priority.masked_fill(~mask, torch.iinfo(priority.dtype).max).topk(taken, largest=False).indices
    count = mask.sum(-1, keepdim=True)
    weight = count.clamp_min(1).to(like.dtype) / count.clamp(1, size)
    padded = torch.arange(taken, device=mask.device) >= count
    return sample, weight.log().masked_fill(padded, -torch.inf).expand(sample.shape)


def blocks_and_sample(
    rows: Float[Tensor, "b h t r d"],
    k: Float[Tensor, "b h c d"],
    v: Float[Tensor, "b h c dv"],
    blocks: Int[Tensor, "b h t s"],
    filled: Bool[Tensor, "b h t s"] | None,
    owner: Int[Tensor, "b h t"],
    block_of_key: Int[Tensor, "b h c"],
    sample: Int[Tensor, "b h l"],
    log_weight: Float[Tensor, "b h l"],
) -> tuple[Float[Tensor, "b h t*r dv"], Float[Tensor, "b h t*r"]]:
    """`(out, lse)` of t tiles of r rows: tile j over the keys `blocks[j]` and over the sample outside block `owner[j]`.

    One kernel: a key that stands for w keys is one whose logit is larger by log w.
    """
    bias = torch.zeros(blocks.shape, dtype=rows.dtype, device=rows.device)
    bias = bias if filled is None else bias.masked_fill(~filled, -torch.inf)
    inside = block_of_key.gather(-1, sample)[:, :, None] == owner[..., None]
    outside = log_weight[:, :, None].masked_fill(inside, -torch.inf)
    bias = torch.cat([bias, outside], -1).flatten(1, 2)[:, :, None]
    chosen = torch.cat([blocks, sample[:, :, None].expand(*inside.shape)], -1)
    keys, values = (take_rows(x, chosen).flatten(1, 2) for x in (k, v))
    out, lse = partial_attention(rows.flatten(1, 2), keys, values, bias=bias)
    return out.reshape(*k.shape[:2], -1, v.shape[-1]), lse.reshape(*k.shape[:2], -1)
