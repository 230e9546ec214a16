"""Dense forms by their definition: the references that fast forms are held to, in float64 when given float64."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def softmax_weights(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n m"]:
    """The matrix P in q's dtype, materialized; a row that sees no key is zero."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if key_padding_mask is not None:
        hidden = hidden | ~key_padding_mask[:, None, None, :]
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return weights.masked_fill(hidden, 0)


def softmax_naive(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b h n dv"]:
    """P v by its definition: the reference, in float64 when given float64. Padded keys and values are not read."""
    if key_padding_mask is not None:
        real = key_padding_mask[:, None, :, None]
        k, v = torch.where(real, k, 0), torch.where(real, v, 0)
    return softmax_weights(q, k, causal=causal, key_padding_mask=key_padding_mask) @ v


def softmax_round_off(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m dv"]
) -> Float[Tensor, "b h n"]:
    """A bound on the Euclidean error that round-off in q's dtype leaves in every row of softmax attention.

    A perturbation ds of the scores moves a row by at most |ds|_inf times the diameter of v. Scores carry a relative
    error of about d eps in |q_i| |k_j| / sqrt(d), the sums over j another sqrt(m) eps.
    """
    eps, d, m = torch.finfo(q.dtype).eps, q.shape[-1], k.shape[2]
    reach = q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True) * d**-0.5
    return eps * (d * reach + 8 * m**0.5) * v.norm(dim=-1).amax(-1, keepdim=True)


def mean_values(
    v: Float[Tensor, "b h m dv"], *, causal: bool, key_padding_mask: Bool[Tensor, "b m"] | None
) -> Float[Tensor, "b h #m dv"]:
    """Mean over the real values of `v`, or over those up to each position; zero where there is none."""
    real = torch.ones_like(v[:, :1, :, :1]) if key_padding_mask is None else key_padding_mask[:, None, :, None].to(v)
    total, count = (v * real, real)
    if causal:
        return total.cumsum(2) / count.cumsum(2).clamp_min(1)
    return total.sum(2, keepdim=True) / count.sum(2, keepdim=True).clamp_min(1)
