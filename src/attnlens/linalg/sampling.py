"""Attention to one block of keys exactly and to all others by a sample without replacement.

A key in the sample S stands for w_j keys, where w_j is the inverse of a probability with which it was taken, so that

    E 1[j in S] w_j = 1,   hence   E sum_{j in S, j not in B} w_j e^{s_j} = sum_{j not in B} e^{s_j}

for every row, whatever the block B, as long as it was chosen without looking at S: given the blocks, row sums are
unbiased.

- `uniform_sample`: every key is taken with probability |S| / c.
- `race_sample`: key j arrives at time e_j / p_j, e_j ~ Exp(1), and the first m to arrive are the sample. With t the
  arrival of the next one, w_j = 1 / (1 - e^{-p_j t}): given the other keys' arrivals, j is taken iff it arrives before
  the m-th of these, which is t if it is. Two weights are uncorrelated and have a variance for m >= 2, so that errors
  add up as squares, and all weights are one when m keys are all there are.

Draws belong to positions, not to places in the sample: a longer input, padded or not, leaves them as they are, where
inversion of a cumulative sum at fixed uniform numbers would redraw every key. Samples and weights are constants for
the gradient, which makes the gradient of the estimated sums unbiased too: the derivative of w_j in p_j would count the
change of a weight without that of the probability to be taken, which undoes it.

Source of the race: "Summarizing data using bottom-k sketches" (Cohen, Kaplan, 2007).
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.blocks import take_rows
from attnlens.linalg.hashed_blocks import Blocks, tile_rows
from attnlens.linalg.partial import merge, partial_attention

Sample = tuple[Int[Tensor, "b h l"], Float[Tensor, "b h l"]]


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


@torch.no_grad()
def race_sample(
    waiting: Float[Tensor, "#b h c"],
    size: int,
    mask: Bool[Tensor, "b #h c"] | None,
    probability: Float[Tensor, "b h c"],
) -> Sample:
    """The `size` first of the real keys to arrive, and the log of how many keys each stands for; -inf for padding."""
    c = probability.shape[-1]
    arrival = waiting.to(probability.dtype) / probability
    arrival = arrival if mask is None else arrival.masked_fill(~mask, torch.inf)
    if size >= c:
        order = arrival.argsort(-1)
        return order, torch.zeros_like(arrival).masked_fill(arrival.gather(-1, order) == torch.inf, -torch.inf)
    first = arrival.topk(size + 1, largest=False)
    sample, after = first.indices[..., :size], first.values[..., size:]
    log_weight = -torch.log(-torch.expm1(-probability.gather(-1, sample) * after))
    return sample, log_weight.masked_fill(first.values[..., :size] == torch.inf, -torch.inf)


@torch.no_grad()
def value_probability(v: Float[Tensor, "b h c dv"], mask: Bool[Tensor, "b #h c"] | None) -> Float[Tensor, "b h c"]:
    """p_j = (|v_j| / sum_l |v_l| + 1 / c) / 2 over the c real keys; padding, of zero values, has no probability."""
    norm = v.norm(dim=-1)
    real = torch.ones_like(norm) if mask is None else mask.to(v.dtype).expand_as(norm)
    total = norm.sum(-1, keepdim=True)
    uniform = real / real.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(total > 0, norm / torch.where(total > 0, total, 1), uniform) / 2 + uniform / 2


def sampled_rest(
    blocks: Blocks, draws: Float[Tensor, "1 h c"] | Int[Tensor, "1 h c"], *, sampler: Callable[..., Sample], size: int
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """An estimator of `hashed_blocks`: the keys of the own block, and the sample `sampler(draws, size, mask, v)` of the
    other blocks. A key that stands for w keys is one whose logit is larger by log w."""
    sample, log_weight = sampler(draws, size, blocks.mask, blocks.v)
    (b, h), t = blocks.k.shape[:2], blocks.owner.shape[2]
    rows = blocks.rows.flatten(0, 1)
    bias = None
    if blocks.filled is not None:
        bias = torch.zeros(blocks.filled.shape, dtype=rows.dtype, device=rows.device)
        bias = bias.masked_fill(~blocks.filled, -torch.inf).expand(b, h, t, -1).flatten(0, 1)[:, :, None]
    keys, values = (tile_rows(blocks, x).flatten(0, 1) for x in (blocks.k, blocks.v))
    near = partial_attention(rows, keys, values, bias=bias)
    # All tiles see the same sample, through one view, less what their own block has.
    keys, values = (take_rows(x, sample).flatten(0, 1)[:, None].expand(-1, t, -1, -1) for x in (blocks.k, blocks.v))
    inside = blocks.block_of_key.gather(-1, sample)[:, :, None] == blocks.owner[..., None]
    outside = log_weight[:, :, None].masked_fill(inside, -torch.inf).flatten(0, 1)[:, :, None]
    out, lse = merge(near, partial_attention(rows, keys, values, bias=outside))
    return out.reshape(b, h, -1, blocks.v.shape[-1]), lse.reshape(b, h, -1)
