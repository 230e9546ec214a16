"""Loki: the keys of every query are chosen by scores in a few principal directions of the keys, then attended exactly.

    S_i = the num_keys visible keys with the largest <B^T q_i, B^T k_j>,
    out_i = sum_{j in S_i} exp(s <q_i, k_j>) v_j / sum_{j in S_i} exp(s <q_i, k_j>),   s = 1/sqrt(d),

B (d x rank) the leading eigenvectors of sum_j k_j k_j^T over calibration keys, one basis a head: `fit` computes it and
keeps it in a buffer. Before that it is the leading coordinates. Time O(n m rank + n m log m + n num_keys d), memory
O(n (d + num_keys)) and one chunk of rows. Equals softmax attention when num_keys >= m, at any rank, and exact top-k
attention when rank >= d.

With R = I - B B^T, the score error is |<q, R k>| <= |R q| |R k| <= |q| |R k|. If it is at most e_i for all keys of row
i, the mass that S_i holds is at least exp(-2 s e_i) times the largest that num_keys keys can hold.

The choice of keys is constant for the gradient, and so is the basis.

Source: "Loki: Low-rank Keys for Efficient Sparse Attention" (Singhania, Singh, He, Feizi, Bhatele, 2024),
https://arxiv.org/abs/2406.02542. Departures: its shares of the length (num_keys = n/4 or n/8) are counts here, so that
the keys of a token do not depend on how many follow. Values take no part in the choice, as some texts have it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.dense import softmax_round_off
from attnlens.linalg.partial import partial_attention
from attnlens.linalg.selected import dropped_mass, selected_attention, top_keys, value_diameter


def principal_directions(
    k: Float[Tensor, "b h n d"], key_padding_mask: Bool[Tensor, "b n"] | None = None
) -> tuple[Float[Tensor, "h d d"], Float[Tensor, "h d"]]:
    """Eigenvectors (columns) and eigenvalues of sum k k^T over all real keys of a head, largest first, in float64."""
    keys = k.detach().double()
    if key_padding_mask is not None:
        keys = torch.where(key_padding_mask[:, None, :, None], keys, 0)
    energy, directions = torch.linalg.eigh((keys.mT @ keys).sum(0))
    return directions.flip(-1), energy.flip(-1).clamp_min(0)


def loki_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    basis: Float[Tensor, "h d r"],
    num_keys: int,
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The formula above; with as many keys as there are, softmax attention."""
    if num_keys >= k.shape[2]:
        return partial_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask)[0]
    index, visible = top_keys(q @ basis, k @ basis, num_keys, causal=causal, key_padding_mask=key_padding_mask)
    return selected_attention(q, k, v, index, visible)[0]


class Loki(AbstractAttention):
    """Top-k attention with low-rank scores.

    Args:
        num_keys: keys a query sees, at least 1.
        rank: principal directions in the scores, at least 1; no more than `head_dim` are used.
        head_dim: of queries and keys.
        num_heads: each has its own basis.
    """

    family = "low rank"
    budget = "num_keys"
    row_stochastic = True
    one_query = True

    def __init__(self, num_keys: int, rank: int, head_dim: int, num_heads: int) -> None:
        super().__init__()
        if num_keys < 1:
            raise ValueError(f"`num_keys` must be at least 1, got {num_keys}")
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}")
        self.num_keys = num_keys
        self.rank = rank
        self.basis: Tensor
        self.register_buffer("basis", torch.eye(head_dim, device="cpu").repeat(num_heads, 1, 1))

    def calibrate(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> bool:
        """By `fit`."""
        self.fit(k, key_padding_mask)
        return True

    def fit(
        self, keys: Float[Tensor, "b h n d"], key_padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "h d"]:
        """Set the basis from calibration keys, as the operator receives them; it is saved with the state.

        Returns:
            The share of the keys' energy in the first 1 .. d directions of every head.

        Raises:
            ValueError: keys of other heads or another head_dim than the operator was built for, or no real key.
        """
        if (keys.shape[1], keys.shape[3]) != tuple(self.basis.shape[:2]):
            raise ValueError(
                f"`keys` must have {tuple(self.basis.shape[:2])} heads and dimensions, got {tuple(keys.shape)}"
            )
        directions, energy = principal_directions(keys, key_padding_mask)
        total = energy.sum(-1, keepdim=True)
        if not (total > 0).all():
            raise ValueError("`keys` must hold a real key that is not zero in every head; give calibration data")
        self.basis.copy_(directions)
        return energy.cumsum(-1) / total

    def scores(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]
    ) -> tuple[Float[Tensor, "b h n m"], Float[Tensor, "b h n m"]]:
        """The scores <B^T q_i, B^T k_j>, and the bound |R q_i| |R k_j| on their distance from <q_i, k_j>; analysis."""
        kept, left = self.basis.to(q.dtype).split([self._used(), self.basis.shape[1] - self._used()], -1)
        bound = (q @ left).norm(dim=-1)[..., None] * (k @ left).norm(dim=-1)[..., None, :]
        return (q @ kept) @ (k @ kept).mT, bound

    def _used(self) -> int:
        return min(self.rank, self.basis.shape[1])

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every key chosen."""
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
        """Dropped mass times the diameter of the visible values, and round-off; from the dense matrix: analysis."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            k, v = torch.where(real, k, 0), torch.where(real, v, 0)
        basis = self.basis[..., : self._used()].to(q.dtype)
        index, _ = top_keys(q @ basis, k @ basis, self.num_keys, **masks)
        bound = dropped_mass(q, k, index, **masks) * value_diameter(v.double(), **masks)
        return (bound + softmax_round_off(q, k, v)).to(q.dtype)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        basis = self.basis[..., : self._used()].to(q.dtype)
        return loki_attention(q, k, v, basis, self.num_keys, causal=causal, key_padding_mask=key_padding_mask)
