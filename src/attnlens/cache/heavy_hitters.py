"""H2O: the newest `recent` entries, and of the others the `heavy` ones that queries have given most weight so far.

The score of an entry is its column sum F_j = sum_i P_ij over all queries since it came, each over the entries that were
there, summed over the query heads of its group. A call of n tokens attends to everything that is there, adds its
weights, then drops to heavy + recent entries; so pieces of a prompt drop less than single tokens would. Equals `Full`
while heavy + recent >= length. O((heavy + recent + n) n H d) a call, (heavy + recent) (2d + 1) floats a group.

No guarantee: the paper's theorem on greedy eviction supposes a score that is submodular; dropping an entry that a later
query needs costs up to that query's weight on it times the diameter of the values.

Source: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (Zhang, Sheng, Zhou,
Chen, Zheng, Cai, Song, Tian, Ré, Barrett, Wang, Chen, 2023), https://arxiv.org/abs/2306.14048. Departure: with shared
keys and values the weights of a group's query heads are summed.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attnlens.cache.eviction import AbstractEviction
from attnlens.cache.store import AbstractStore
from attnlens.linalg.column_mass import column_mass
from attnlens.linalg.suffix import suffix_attention


@final
class HeavyHitters(AbstractEviction):
    """Heavy hitters and the newest entries.

    Args:
        heavy: entries kept for their weight, at least 1.
        recent: newest entries, at least 1.
        store: how entries are written down; `Plain` where None.

    Raises:
        ValueError: a number below 1, or a store that does not fit.
    """

    def __init__(self, heavy: int, recent: int, store: AbstractStore | None = None) -> None:
        if heavy < 1:
            raise ValueError(f"`heavy` must be at least 1, got {heavy}; a window alone is the policy `sliding`")
        if recent < 1:
            raise ValueError(f"`recent` must be at least 1 (a new entry has no weight yet), got {recent}")
        super().__init__(store, recent=recent, name="recent")
        self.heavy, self.recent = heavy, recent

    def begin(self, batch: int, num_groups: int, like: Tensor) -> Float[Tensor, "b g 0"]:
        """Scores of no entries."""
        return like.new_zeros(batch, num_groups, 0, dtype=torch.promote_types(like.dtype, torch.float32))

    def choose(
        self,
        memory: Float[Tensor, "b g old"],
        q: Float[Tensor, "b h n d"],
        keys: Float[Tensor, "b g m d"],
        values: Float[Tensor, "b g m dv"],
    ) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b g r"], Int[Tensor, "b g r"] | None]:
        out, m = suffix_attention(q, keys, values), keys.shape[2]
        mass = F.pad(memory, (0, m - memory.shape[2])) + column_mass(q, keys)
        if m <= self.heavy + self.recent:
            return out, mass, None
        heavy = mass[..., : m - self.recent].topk(self.heavy, dim=-1).indices.sort(-1).values
        newest = torch.arange(m - self.recent, m, device=mass.device).expand(*mass.shape[:2], -1)
        index = torch.cat([heavy, newest], -1)
        return out, mass.gather(2, index), index
