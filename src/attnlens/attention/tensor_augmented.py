"""Attention over keys and values that are compressed as tensors: rows x columns x features, by a Tucker decomposition.

    K - 1 mu_k^T ~ G_k x_1 A_1 x_2 A_2 x_3 A_3,   V - 1 mu_v^T ~ G_v x_1 B_1 x_2 B_2 x_3 B_3,
    out = mu_v + softmax(s (Q A_3) (G_k x_1 A_1 x_2 A_2)^T) (G_v x_1 B_1 x_2 B_2) B_3^T,   s = 1/sqrt(d),

the sequence a grid of rows of `num_columns` tokens, ranks min(rank, N_i), mu the means over the real tokens. Softmax
does not see mu_k, and with mu_v apart a constant value is met exactly, as is the mean where the compression keeps
nothing else. Weights on single tokens may be negative.

What is saved: of each key and value r = `rank` features in place of d enter scores and outputs, time O(n m r + (n + m)
d r + m (N1 + N2 + d) d + N1^3 + N2^3 + d^3), memory O(n d); and keys and values kept as cores and factors are r^3 + r
(N1 + N2 + d) numbers each in place of m d. What is not: the token modes are expanded again before the kernel, all m
scores of a row are computed, and the compression of rows and columns saves no arithmetic. Attention over the r^2 core
tokens themselves would, but a rotation along the sequence does not commute with the softmax, and it is not softmax
attention even at full rank.

Equals softmax attention when rank >= m, or >= N1, N2 and d. With e_ij = s <q_i, k_j - k~_j>,

    |out_i - softmax_i| <= tanh((max_j e_ij - min_j e_ij) / 4) diam(V~) + sum_j P_ij |v_j - v~_j|.

Not causal: every factor is made of all tokens.

Source: "TEAFormers: TEnsor-Augmented Transformers for Multi-Dimensional Time Series Forecasting" (Kong, Chen, Chen,
Han, 2024), https://arxiv.org/abs/2410.20439, known here from its abstract. Departures: the paper's tensor layers around
the attention belong to a model; here Tucker (not CP, whose best approximation need not exist) stands inside of one
head, in a form that converges. The factors are those of the input and are differentiated.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.dense import mean_values, softmax_round_off, softmax_weights
from attnlens.linalg.grid import fixed_modes, grid_shape, to_grid, to_sequence
from attnlens.linalg.partial import partial_attention
from attnlens.linalg.selected import value_diameter
from attnlens.linalg.tucker import Tucker, tucker


def compress(
    x: Float[Tensor, "b h m d"], num_columns: int, rank: int, key_padding_mask: Bool[Tensor, "b m"] | None
) -> tuple[Float[Tensor, "b h 1 d"], Tucker]:
    """The mean over the real tokens, and the decomposition of the rest; padding is zero before and after."""
    mean = mean_values(x, causal=False, key_padding_mask=key_padding_mask)
    rest = x - mean
    if key_padding_mask is not None:
        rest = torch.where(key_padding_mask[:, None, :, None], rest, 0)
    return mean, tucker(to_grid(rest, grid_shape(x.shape[2], (num_columns,))), rank)


def narrow(parts: Tucker, length: int) -> tuple[Float[Tensor, "b h m r"], Float[Tensor, "b h d r"] | None]:
    """The tokens in the coordinates of the feature factor, and that factor."""
    return to_sequence(parts.expand(2), length), parts.factors[2]


def tensor_augmented_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    num_columns: int,
    rank: int,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """The formulas above."""
    _, of_keys = compress(k, num_columns, rank, key_padding_mask)
    mean, of_values = compress(v, num_columns, rank, key_padding_mask)
    keys, from_keys = narrow(of_keys, k.shape[2])
    values, from_values = narrow(of_values, k.shape[2])
    queries = q if from_keys is None else q @ from_keys
    scale = q.shape[-1] ** -0.5
    out, _ = partial_attention(queries, keys, values, key_padding_mask=key_padding_mask, scale=scale)
    return mean + (out if from_values is None else out @ from_values.mT)


class TensorAugmented(AbstractAttention):
    """Softmax attention with Tucker-compressed keys and values.

    Args:
        num_columns: length of a row of the grid, at least 1; near the root of the length, or the eigenvectors of the
            (m / num_columns) x (m / num_columns) Gram matrix cost more than the kernel.
        rank: of rows, columns and features, at least 1; no more than each has is used.
    """

    family = "tensor"
    budget = "rank"
    causal = False

    def __init__(self, num_columns: int, rank: int) -> None:
        super().__init__()
        fixed_modes(num_columns, None)
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}")
        self.num_columns, self.rank = num_columns, rank

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With as many features as tokens can span."""
        return {"rank": length}

    def reconstruct(
        self, x: Float[Tensor, "b h m d"], key_padding_mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b h m d"]:
        """What is left of keys or values after compression, the mean included; analysis."""
        mean, parts = compress(x, self.num_columns, self.rank, key_padding_mask)
        return mean + to_sequence(parts.expand(3), x.shape[2])

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """The bound above from dense matrices: analysis. Round-off is added."""
        real = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        k, v = (torch.where(real[:, None, :, None], x, 0) for x in (k, v))
        wide = [x.double() for x in (q, k, v)]
        k_left, v_left = (self.reconstruct(x, key_padding_mask) for x in wide[1:])
        gap = wide[0] @ (wide[1] - k_left).mT * q.shape[-1] ** -0.5
        hidden = ~real[:, None, None]
        spread = gap.masked_fill(hidden, -torch.inf).amax(-1) - gap.masked_fill(hidden, torch.inf).amin(-1)
        bound = torch.tanh(spread.clamp_min(0) / 4)
        bound = bound * value_diameter(v_left, causal=False, key_padding_mask=key_padding_mask)
        weights = softmax_weights(wide[0], wide[1], key_padding_mask=key_padding_mask)
        bound = bound + (weights @ (wide[2] - v_left).norm(dim=-1)[..., None])[..., 0]
        return bound.to(q.dtype) + 3 * softmax_round_off(q, k, v)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return tensor_augmented_attention(q, k, v, self.num_columns, self.rank, key_padding_mask)
