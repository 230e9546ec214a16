"""The first `num_sinks` entries and the newest `window`: decoding is causal `streaming` attention.

Query i sees P_i = {j <= i : j < num_sinks or i - j < window}, in a prefill, in pieces and token by token alike, at most
(num_sinks + window) entries. Equals `Full` while num_sinks + window >= length.

Source: "Efficient Streaming Language Models with Attention Sinks" (Xiao, Tian, Chen, Han, Lewis, 2023),
https://arxiv.org/abs/2309.17453. Departure: the paper renumbers positions inside the cache; here keys come with their
positions in them and keep their true distances.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.streaming import streaming_attention
from attnlens.cache.eviction import AbstractEviction
from attnlens.cache.store import AbstractStore
from attnlens.linalg.suffix import repeat_groups, suffix_attention


@final
class Sliding(AbstractEviction):
    """A sliding window with attention sinks.

    Args:
        window: newest entries, the query's own included, at least 1.
        num_sinks: first entries that always stay, at least 0.
        store: how entries are written down; `Plain` where None.

    Raises:
        ValueError: a number out of its range, or a store that does not fit.
    """

    def __init__(self, window: int, num_sinks: int = 4, store: AbstractStore | None = None) -> None:
        if window < 1:
            raise ValueError(f"`window` must be at least 1 (the token's own entry), got {window}")
        if num_sinks < 0:
            raise ValueError(f"`num_sinks` must be at least 0, got {num_sinks}; 0 keeps no sinks")
        super().__init__(store, recent=window, name="window")
        self.window, self.num_sinks = window, num_sinks

    def begin(self, batch: int, num_groups: int, like: Tensor) -> None:
        """Nothing: places tell all."""

    def choose(
        self,
        memory: None,
        q: Float[Tensor, "b h n d"],
        keys: Float[Tensor, "b g m d"],
        values: Float[Tensor, "b g m dv"],
    ) -> tuple[Float[Tensor, "b h n dv"], None, Int[Tensor, "b g r"] | None]:
        m, n = keys.shape[2], q.shape[2]
        if m <= self.num_sinks + self.window:
            return suffix_attention(q, keys, values), None, None
        places = torch.arange(m, device=keys.device)
        places = torch.cat([places[: self.num_sinks], places[m - self.window :]])
        index = places.expand(*keys.shape[:2], -1)
        if n == 1:
            near = (torch.cat([x[:, :, : self.num_sinks], x[:, :, m - self.window :]], 2) for x in (keys, values))
            return suffix_attention(q, *near), None, index
        # Sinks and a run of neighbors: without the gap between them distances inside the window are the same.
        before = F.pad(q, (0, 0, m - n, 0))
        keys, values = (repeat_groups(x, q.shape[1]) for x in (keys, values))
        out = streaming_attention(before, keys, values, self.num_sinks, self.window, causal=True, key_padding_mask=None)
        return out[:, :, m - n :], None, index
