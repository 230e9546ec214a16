"""Skeinformer: a column sketch of the softmax matrix, importance from pilot rows, one fill-in value for the other keys.

1. Pilot rows: m uniformly random queries J attend exactly, with weights P_J.
2. Importance: p_j ~ |P_{J,j}| |v_j|, the column norms seen by the pilots; m keys S are drawn without replacement.
3. Adaptive row normalization: in row i the keys outside S, |S^c| of them, are each taken for the geometric mean g_i of
   the kept entries, with s_ij = <q_i, k_j> / sqrt(d):

    out_i = (sum_{j in S} e^{s_ij} v_j + g_i sum_{j not in S} v_j) / (sum_{j in S} e^{s_ij} + |S^c| g_i).

4. The rows J take their exact outputs.

A geometric mean of exponentials is the exponential of a mean, g_i = exp(<q_i, mean_S k> / sqrt(d)): step 3 is softmax
attention over m + 1 keys, the last of which is the mean of the kept keys, has the mean of the other values, and counts
|S^c| times. The column norms are a log-sum-exp over the pilots, |P_{J,j}|^2 = sum_i exp(2 s_ij - 2 lse_i), and nothing
of size n x m is stored. Time O(n m (d + dv) + n log n), memory O(n (d + dv)). Equals softmax with m >= n.

The draws of S are Gumbel keys, log p_j + gumbel_j, of which the m largest are a successive draw without replacement.
S is constant for the gradient, p depends on the values: `matrix` shows the weights for values of equal norm.

Source: "Sketching as a Tool for Understanding and Accelerating Self-Attention for Long Sequences" (Chen, Zeng, Ji,
Yang, 2022), https://arxiv.org/abs/2112.05359. Departures: exponents are shifted by their log-sum-exp; pilots and keys
are drawn among an example's real tokens only.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import take_rows
from attnlens.linalg.partial import partial_attention


@torch.no_grad()
def log_importance(
    pilots: Float[Tensor, "b h m d"],
    lse: Float[Tensor, "b h m"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
) -> Float[Tensor, "b h n"]:
    """log(|P_{J,j}| |v_j|) of every key, from the pilots' queries and log-sum-exps; -inf pilots are left out."""
    # Attention of the keys over the pilots, at twice the scale: only its log-sum-exp is of use.
    empty = torch.zeros_like(pilots[..., :1])
    _, twice = partial_attention(k, pilots, empty, bias=-2 * lse[:, :, None], scale=2 * k.shape[-1] ** -0.5)
    tiny = torch.finfo(v.dtype).tiny
    return twice / 2 + v.norm(dim=-1).clamp_min(tiny).log()


def filled_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    columns: Int[Tensor, "b h m"],
    count: Int[Tensor, "#b 1 1"],
) -> Float[Tensor, "b h n dv"]:
    """Step 3, with `count` real keys an example; padding has zero keys and values and stands last in `columns`."""
    kept = torch.arange(columns.shape[-1], device=q.device) < count
    keys, values = take_rows(k, columns), take_rows(v, columns)
    size = kept.sum(-1, keepdim=True)
    rest = count - size
    mean_key = keys.sum(2, keepdim=True) / size[..., None].clamp_min(1)
    mean_value = (v.sum(2, keepdim=True) - values.sum(2, keepdim=True)) / rest[..., None].clamp_min(1)
    zero = torch.zeros(kept.shape, dtype=q.dtype, device=q.device).masked_fill(~kept, -torch.inf)
    # log 0 = -inf hides the fill-in where no key is missing.
    bias = torch.cat([zero, rest.to(q.dtype).log()], -1)[:, :, None]
    keys, values = torch.cat([keys, mean_key], 2), torch.cat([values, mean_value], 2)
    return partial_attention(q, keys, values, bias=bias)[0]


def skeinformer_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    priority: Int[Tensor, "h n"],
    gumbel: Float[Tensor, "h n"],
    num_samples: int,
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Steps 1 to 4; softmax attention for an example that has no more real tokens than samples."""
    n = q.shape[2]
    if n <= num_samples:
        return partial_attention(q, k, v, key_padding_mask=key_padding_mask)[0]
    real = torch.ones(1, 1, n, dtype=torch.bool, device=q.device)
    real = real if key_padding_mask is None else key_padding_mask[:, None]
    last = torch.iinfo(priority.dtype).max
    rows = priority.masked_fill(~real, last).topk(num_samples, largest=False).indices.expand(*q.shape[:2], -1)
    pilots = take_rows(q, rows)
    exact, lse = partial_attention(pilots, k, v, key_padding_mask=key_padding_mask)
    # A place without a real query is a padded row, whose zero query would count as a pilot.
    idle = torch.arange(num_samples, device=q.device) >= real.sum(-1, keepdim=True)
    importance = log_importance(pilots, lse.masked_fill(idle, torch.inf), k, v)
    importance = (importance + gumbel.to(importance.dtype)).masked_fill(~real, -torch.inf)
    columns = importance.topk(num_samples).indices
    out = filled_attention(q, k, v, columns, real.sum(-1, keepdim=True))
    return out.scatter(2, rows[..., None].expand(*rows.shape, v.shape[-1]), exact)


class Skeinformer(AbstractAttention):
    """Sketched attention with importance from pilot rows.

    Args:
        num_samples: m, both of pilot rows and of kept keys, at least 1.
        num_heads: each has its own draws.
        max_length: the longest input.
        seed: of the draws.
    """

    family = "low rank"
    budget = "num_samples"
    causal = False
    self_attention = True
    row_stochastic = True
    rows_independent = False

    def __init__(self, num_samples: int, num_heads: int, max_length: int, seed: int) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, got {num_samples}")
        self.num_samples = num_samples
        generator = torch.Generator().manual_seed(seed)
        self.priority: Tensor
        self.gumbel: Tensor
        # Integers, which keep their order when the module is cast to half precision.
        order = torch.rand(num_heads, max_length, generator=generator, device="cpu").argsort(-1)
        self.register_buffer("priority", order)
        waiting = torch.empty(num_heads, max_length, device="cpu").exponential_(generator=generator)
        self.register_buffer("gumbel", -waiting.clamp_min(torch.finfo(waiting.dtype).tiny).log())

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every row a pilot and every key kept."""
        return {"num_samples": length}

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        n, longest = q.shape[2], self.priority.shape[1]
        if n > longest:
            raise ValueError(f"length {n} is beyond `max_length`={longest}: build with a larger one")
        draws = self.priority[:, :n], self.gumbel[:, :n]
        return skeinformer_attention(q, k, v, *draws, self.num_samples, key_padding_mask)
