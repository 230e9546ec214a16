"""Exact top-k attention: every query over the keys with its largest scores, the oracle of sparse attention.

    out_i = sum_{j in S_i} exp(s <q_i, k_j>) v_j / sum_{j in S_i} exp(s <q_i, k_j>),   s = 1/sqrt(d),

S_i the `num_keys` visible keys with the largest <q_i, k_j>, the first of equal ones. With `remainder`, the mass
1 - delta_i of S_i under softmax over all keys is kept, and what is dropped goes to the mean of the visible values:

    out_i = sum_{j in S_i} P_ij v_j + delta_i mean(V).

Without it a diffuse row is worse off than with mean(V) alone; with it too, but far less, since mean(V) counts the
chosen keys once more.

All scores are computed: time O(n m (d + log m)), another O(n m d) for `remainder`; memory O(n (d + num_keys)) and one
chunk of rows. Equals softmax attention when num_keys >= m.

S_i holds the largest mass that `num_keys` keys can: no other choice has a smaller total variation, which is delta_i.
The choice is constant for the gradient, which is the exact one wherever no two scores are equal.

Source: the exact selection that sparse methods imitate, as in "Memory-efficient Transformers via Top-k Attention"
(Gupta, Dar, Goodman, Ciprut, Berant, 2021), https://arxiv.org/abs/2106.06899; the remainder after "SparQ Attention"
(Ribar et al., 2023), https://arxiv.org/abs/2312.04985, here with the exact mass.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.dense import mean_values, softmax_round_off
from attnlens.linalg.partial import partial_attention
from attnlens.linalg.selected import dropped_mass, selected_attention, top_keys, value_diameter


def topk_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    num_keys: int,
    remainder: bool,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Both formulas above; with as many keys as there are, softmax attention."""
    if num_keys >= k.shape[2]:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
    index, visible = top_keys(q, k, num_keys, causal=causal, key_padding_mask=key_padding_mask)
    out, lse = selected_attention(q, k, v, index, visible)
    if not remainder:
        return out
    # The normalizer over all keys, without an n x m matrix in either pass; the output beside it is not used.
    total = partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[1]
    empty = total == -torch.inf
    log_kept = (lse.masked_fill(empty, 0) - total.masked_fill(empty, 0))[..., None]
    mean = mean_values(v, causal=causal, key_padding_mask=key_padding_mask)
    return log_kept.exp() * out - torch.expm1(log_kept) * mean


class TopK(AbstractAttention):
    """Exact top-k attention.

    Args:
        num_keys: keys a query sees, at least 1.
        remainder: whether the mass of the other keys goes to the mean of the visible values, or is shared out in
            proportion among the keys chosen.
    """

    family = "sparse"
    budget = "num_keys"
    row_stochastic = True
    one_query = True

    def __init__(self, num_keys: int, remainder: bool = False) -> None:
        super().__init__()
        if num_keys < 1:
            raise ValueError(f"`num_keys` must be at least 1, got {num_keys}")
        self.num_keys = num_keys
        self.remainder = remainder

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every key among the top."""
        return {"num_keys": length}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """Dropped mass times the spread of the visible values, from the dense matrix: analysis, not the fast path.

        Renormalized, delta_i diam(V_i). With the remainder the error is the mean of v_j - mean(V_i) over the keys left
        out, times delta_i: at most delta_i max_j |v_j - mean(V_i)|. Both are at most 2 delta_i max |v|. Round-off is
        added.
        """
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            k, v = torch.where(real, k, 0), torch.where(real, v, 0)
        index, _ = top_keys(q, k, self.num_keys, **masks)
        spread = value_radius(v.double(), **masks) if self.remainder else value_diameter(v.double(), **masks)
        return (dropped_mass(q, k, index, **masks) * spread + softmax_round_off(q, k, v)).to(q.dtype)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return topk_attention(q, k, v, self.num_keys, self.remainder, causal=causal, key_padding_mask=key_padding_mask)


def value_radius(
    v: Float[Tensor, "b h m dv"], *, causal: bool, key_padding_mask: Bool[Tensor, "b m"] | None
) -> Float[Tensor, "b h #m"]:
    """The largest distance of a real value from the mean of all, or of one up to each position from their mean."""
    apart = torch.cdist(mean_values(v, causal=causal, key_padding_mask=key_padding_mask), v)
    if key_padding_mask is not None:
        apart = apart.masked_fill(~key_padding_mask[:, None, None, :], 0)
    return (apart.tril() if causal else apart).amax(-1)
