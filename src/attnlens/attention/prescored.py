"""Pre-scoring: a few keys that stand for all, then any operator over them.

    out = operator(q, K_S, V_S),   S = min(s, m) keys chosen from K alone (`linalg.key_selection`):

the key nearest to the center of each of s clusters (k-means, k-median), or those with the largest leverage scores.
Time: that of the operator over s keys, plus O(iterations m s d) for clusters or O(m d^2) for leverage scores; memory
likewise, plus O(m (s + d)), or O(m d). With s >= m it is the operator itself, so it equals softmax where that does.

What is left out is gone, not estimated: with delta_i the softmax mass outside S, softmax over S is off by at most
delta_i diam(V), and no s < m makes that small for every input. S reads all keys, so it is not causal. S is constant for
the gradient: a key that is not chosen, and its value, have none.

Source: "Efficient Attention via Pre-Scoring: Prioritizing Informative Keys in Transformers" (Li, Wang, Bao, Woodruff,
2025), https://arxiv.org/abs/2505.11040, with HyperAttention as the operator. That one needs
`sort_queries: false` here, since there are more queries than keys. Departures: a cluster gives its own nearest
key, so that s different keys are chosen; as many clusters as keys are wanted.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import take_rows
from attnlens.linalg.dropped_mass import dropped_mass_bound
from attnlens.linalg.key_selection import AbstractKeySelection


class Prescored(AbstractAttention):
    """An operator over selected keys.

    Args:
        num_keys: s, at least 1.
        operator: what attends to them; it must take more queries than keys.
        selection: `KMeans`, `KMedian` or `Leverage` of attnlens.linalg.key_selection.
    """

    family = "sampling"
    budget = "num_keys"
    causal = False

    def __init__(self, num_keys: int, operator: AbstractAttention, selection: AbstractKeySelection) -> None:
        super().__init__()
        if num_keys < 1:
            raise ValueError(f"`num_keys` must be at least 1, got {num_keys}")
        if operator.self_attention:
            raise ValueError(
                f"`operator` must take more queries than keys, got {type(operator).__name__}, which needs equal "
                "lengths; HyperAttention and KDEformer take them with `sort_queries: false`"
            )
        self.num_keys, self.operator, self.selection = num_keys, operator, selection
        # A subset of the keys changes nothing about what an operator's rows are.
        self.target = operator.target  # pyright: ignore[reportAttributeAccessIssue]
        self.bound_probability = operator.bound_probability  # pyright: ignore[reportAttributeAccessIssue]
        self.row_stochastic = operator.row_stochastic  # pyright: ignore[reportAttributeAccessIssue]
        self.rows_independent = operator.rows_independent  # pyright: ignore[reportAttributeAccessIssue]
        self.host_step = operator.host_step  # pyright: ignore[reportAttributeAccessIssue]
        self.graph_break = operator.graph_break  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every key chosen, where the operator is exact."""
        return {"num_keys": length}

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """That of the operator, over all keys."""
        return self.operator.reference(q, k, v, causal=causal, key_padding_mask=key_padding_mask)

    def choose(
        self, k: Float[Tensor, "b h m d"], mask: Bool[Tensor, "b m"] | None
    ) -> tuple[Int[Tensor, "b h s"], Bool[Tensor, "b s"] | None]:
        """S, real keys first, and which of its places hold one (None: all)."""
        chosen = self.selection(k, self.num_keys, mask)
        if mask is None:
            return chosen, None
        return chosen, torch.arange(chosen.shape[-1], device=k.device) < mask.sum(-1, keepdim=True)

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"] | None:
        """delta_i diam(V) and the operator's own bound over S, where it has one against softmax: analysis."""
        if self.operator.target != "softmax":
            return None
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            k, v = torch.where(real, k, 0), torch.where(real, v, 0)
        chosen, mask = self.choose(k, key_padding_mask)
        own = self.operator.error_bound(q, take_rows(k, chosen), take_rows(v, chosen), key_padding_mask=mask)
        visited = torch.zeros(*k.shape[:3], dtype=torch.bool, device=k.device).scatter(-1, chosen, True)
        visited = visited[:, :, None].expand(-1, -1, q.shape[2], -1)
        left_out = dropped_mass_bound(visited, q, k, v, causal=False, key_padding_mask=key_padding_mask)
        return None if own is None else own + left_out

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        if self.num_keys >= k.shape[2]:
            return self.operator(q, k, v, key_padding_mask=key_padding_mask)
        chosen, mask = self.choose(k, key_padding_mask)
        return self.operator(q, take_rows(k, chosen), take_rows(v, chosen), key_padding_mask=mask)
