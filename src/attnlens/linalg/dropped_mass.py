"""What softmax attention loses when keys are left out of a row.

Let S_i be the keys that row i visits and delta_i = sum_{j not in S_i} P_ij the softmax mass that it drops. Exact
attention is out_i = (1 - delta_i) a_i + delta_i c_i, with a_i the softmax mean of the values over S_i, which a method
that renormalizes returns, and c_i that over the rest. Both are means of values, so that

    |a_i - out_i| = delta_i |c_i - a_i| <= delta_i diam(V).

A row that visits no key returns zero, off by max |v| at most. The bound is attained by two opposite values, one on S_i
and one on the rest.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.linalg.dense import softmax_round_off, softmax_weights


def dropped_mass_bound(
    visited: Bool[Tensor, "b h n m"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n"]:
    """delta_i diam(V) and round-off, for softmax over the `visited` keys; dense float64: analysis, not a fast path."""
    real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
    shown = real[:, None, :, None]
    k, v = torch.where(shown, k, 0), torch.where(shown, v, 0)
    weights = softmax_weights(q.double(), k.double(), causal=causal, key_padding_mask=key_padding_mask)
    values = v.double()
    # Squared norms, of which a matrix product would take the difference, lose small distances of long values.
    apart = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
    diameter = apart.masked_fill(~(shown & shown.mT), 0).amax((-2, -1))[..., None]
    # Summed over the dropped keys, not one minus the kept: the difference of two nearly equal numbers is round-off.
    dropped = weights.masked_fill(visited, 0).sum(-1)
    largest = values.norm(dim=-1).amax(-1, keepdim=True)
    # Not where weights > 0: those of all visited keys may underflow, and the row still returns a mean of their values.
    visible = visited & real[:, None, None]
    visible = (visible.tril() if causal else visible).any(-1)
    bound = torch.where(visible, dropped * diameter, largest)
    return (bound + softmax_round_off(q, k, v)).to(q.dtype)
