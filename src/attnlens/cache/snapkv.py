"""SnapKV: of a prompt, the entries that its last `window` queries vote for; every token after it stays.

    votes_j = pool_j( sum_{i in window} P_ij ),   j outside the window,

P over the whole prompt, summed over the query heads of a group; pool is the mean over `kernel` neighbors (zeros
outside). The (budget - window) entries with most votes stay, and the window. Equals `Full` where budget >= the length
of the prompt. The prompt is the first call: fed token by token there is nothing to vote on and all stays. One more
O(window N H d); (budget + new tokens) 2d floats a group.

No guarantee: it supposes that later queries look where the last ones of the prompt looked.

Source: "SnapKV: LLM Knows What You are Looking for Before Generation" (Li, Huang, Yang, Venkitesh, Locatelli, Ye, Cai,
Lewis, Chen, 2024), https://arxiv.org/abs/2404.14469. Departure: with shared keys and values the votes of a group's
query heads are summed; the authors' code keeps entries for every query head.
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
class SnapKV(AbstractEviction):
    """A prompt compressed once.

    Args:
        budget: entries kept of the prompt, the window included.
        window: last tokens of the prompt, which vote and stay, at least 1 and at most `budget`.
        kernel: odd number of neighbors that votes are averaged over.
        store: how entries are written down; `Plain` where None.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, budget: int, window: int = 32, kernel: int = 5, store: AbstractStore | None = None) -> None:
        if window < 1:
            raise ValueError(f"`window` must be at least 1 (the queries that vote), got {window}")
        if budget < window:
            raise ValueError(f"`budget` holds the `window`, got {budget} and {window}: raise it, or lower `window`")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"`kernel` must be odd and at least 1, got {kernel}; 1 does not pool")
        # A prompt is chosen from before it is stored, and nothing is dropped afterwards: any store fits.
        super().__init__(store, recent=None, name="window")
        self.budget, self.window, self.kernel = budget, window, kernel

    def begin(self, batch: int, num_groups: int, like: Tensor) -> bool:
        """Whether the prompt has been seen."""
        return False

    def choose(
        self,
        memory: bool,
        q: Float[Tensor, "b h n d"],
        keys: Float[Tensor, "b g m d"],
        values: Float[Tensor, "b g m dv"],
    ) -> tuple[Float[Tensor, "b h n dv"], bool, Int[Tensor, "b g r"] | None]:
        out, m = suffix_attention(q, keys, values), keys.shape[2]
        if memory or m <= self.budget:
            return out, True, None
        votes = column_mass(q[:, :, -self.window :], keys)[..., : m - self.window]
        pooled = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        chosen = pooled.topk(self.budget - self.window, dim=-1).indices.sort(-1).values
        newest = torch.arange(m - self.window, m, device=votes.device).expand(*votes.shape[:2], -1)
        return out, True, torch.cat([chosen, newest], -1)
