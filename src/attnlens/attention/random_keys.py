"""Softmax attention over a uniformly random subset of the keys: the null row of every method that selects keys.

    out_i = sum_{j in S_i} exp(s <q_i, k_j>) v_j / sum_{j in S_i} exp(s <q_i, k_j>),   |S_i| = min(num_keys, visible).

Bidirectional, S is one subset for all queries: the real keys with the smallest of a fixed random priority. Causal,
S_i is the reservoir after i tokens ("Random Sampling with a Reservoir", Vitter, 1985): a uniform subset of the past
that never depends on the future. Time O(n num_keys d), memory O(n num_keys) when causal. Equals softmax when
num_keys >= length.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.partial import partial_attention

ROWS = 256


def reservoir(uniform: Float[Tensor, " n"], num_keys: int) -> Int[Tensor, "n r"]:
    """The members of a reservoir of `num_keys` slots after each of n tokens, from one uniform draw a token; -1 = empty.

    Token i < r takes slot i; a later one takes slot floor(u_i (i + 1)) if that is below r, replacing its holder.
    """
    position = torch.arange(uniform.shape[0], device=uniform.device)
    slot = torch.where(position < num_keys, position, (uniform * (position + 1)).long())
    taken = slot[:, None] == torch.arange(min(num_keys, uniform.shape[0]), device=uniform.device)
    return torch.where(taken, position[:, None], -1).cummax(0).values


def causal_random_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    members: Int[Tensor, "n r"],
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Every row over its own members, `ROWS` rows at a time so that the gathered keys stay small."""
    outs = []
    for start in range(0, q.shape[2], ROWS):
        index = members[start : start + ROWS]
        hidden = (index < 0)[None]
        index = index.clamp_min(0)
        if key_padding_mask is not None:
            hidden = hidden | ~key_padding_mask[:, index]
        scores = (q[:, :, start : start + ROWS, None] * k[:, :, index]).sum(-1) * q.shape[-1] ** -0.5
        empty = hidden.all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill((hidden & ~empty)[:, None], -torch.inf), -1)
        outs.append((weights.masked_fill(empty[:, None], 0)[..., None] * v[:, :, index]).sum(-2))
    return torch.cat(outs, 2)


class RandomKeys(AbstractAttention):
    """The null operator of key selection.

    Args:
        num_keys: keys a query sees, at least 1.
        max_length: the longest input.
        seed: of the draw.
    """

    family = "null"
    budget = "num_keys"
    row_stochastic = True

    def __init__(self, num_keys: int, max_length: int, seed: int) -> None:
        super().__init__()
        if num_keys < 1:
            raise ValueError(f"`num_keys` must be at least 1, got {num_keys}")
        self.num_keys = num_keys
        generator = torch.Generator().manual_seed(seed)
        self.uniform: Tensor
        self.register_buffer("uniform", torch.rand(max_length, generator=generator, device="cpu"))

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every key in the sample."""
        return {"num_keys": length}

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        m = k.shape[2]
        if m > self.uniform.shape[0]:
            raise ValueError(f"length {m} is beyond `max_length`={self.uniform.shape[0]}: build with a larger one")
        if causal:
            members = reservoir(self.uniform[:m], self.num_keys)
            return causal_random_attention(q, k, v, members, key_padding_mask)
        priority = self.uniform[:m].expand(k.shape[0], m)
        if key_padding_mask is not None:
            priority = priority.masked_fill(~key_padding_mask, torch.inf)
        chosen = priority.topk(min(self.num_keys, m), dim=-1, largest=False).indices
        index = chosen[:, None, :, None]
        k, v = k.take_along_dim(index, 2), v.take_along_dim(index, 2)
        mask = None if key_padding_mask is None else key_padding_mask.gather(1, chosen)
        return partial_attention(q, k, v, key_padding_mask=mask)[0]
