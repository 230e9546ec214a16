"""Kronecker attention: softmax attention on a grid whose logits are sums of one term a mode.

    out_a = sum_b P_ab v_b,   P = softmax_b(l_1(a_1, b_1) + ... + l_m(a_m, b_m)),   a, b cells of an N1 x ... x Nm grid.

On a full grid P = softmax(l_1) (x) ... (x) softmax(l_m), applied to V one mode after the other: time O(n (N1 + ... +
Nm) dv), memory O(n dv + N1^2 + ... + Nm^2). With masked cells P no longer is a Kronecker product. Then

    u_m = v, L_m = 0 or -inf on masked cells,   w = softmax_{b_i}(l_i(a_i, b_i) + L_i),
    u_{i-1} = sum_{b_i} w u_i,   L_{i-1} = logsumexp_{b_i}(l_i(a_i, b_i) + L_i),

one mode after the other from the last, is the same sum without an underflow; its weights take n (N1 + ... + Nm)
numbers.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.linalg.dense import softmax_round_off
from attnlens.linalg.grid import grid_shape, mode_product
from attnlens.linalg.selected import value_diameter


def kronecker_attention(
    logits: Sequence[Float[Tensor, "b h _ _"]], v: Float[Tensor, "b h *grid dv"], real: Bool[Tensor, "#b *grid"] | None
) -> Float[Tensor, "b h *grid dv"]:
    """The formula above; `logits[i]` are those of mode i. Without a real cell the result is zero."""
    if real is None:
        for mode, term in enumerate(logits):
            v = mode_product(v, torch.softmax(term, -1), mode)
        return v
    mass = torch.zeros_like(v[..., 0]).masked_fill(~real[:, None], -torch.inf)
    for mode, term in reversed(list(enumerate(logits))):
        axis = 2 + mode
        rows = v.movedim(axis, -2)
        beside = term[(slice(None), slice(None), *(None,) * (v.ndim - 4))]
        scores = beside + mass.movedim(axis, -1)[..., None, :]
        hidden = scores == -torch.inf
        empty = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0)
        weights = torch.softmax(scores, -1).masked_fill(hidden, 0)
        v = (weights @ rows).movedim(-2, axis)
        mass = torch.logsumexp(scores, -1).masked_fill(empty[..., 0], -torch.inf).movedim(-1, axis)
    return v


def kronecker_bound(
    logits: Sequence[Float[Tensor, "b h _ _"]],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    fixed: tuple[int, ...],
    key_padding_mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n"]:
    """A bound on the error of every row against softmax attention; dense, for analysis. Padding holds zeros.

    Two softmax distributions whose logits differ by e are apart by tanh((max e - min e) / 4) in total variation at
    most, with equality for two keys: a ratio of probabilities lies between exp(-a) and exp(b) with a + b = max e - min
    e, and sigmoid(x + a + b) - sigmoid(x) is largest in the middle. An error in the weights counts diam(V) at most.
    """
    n = q.shape[2]
    places = torch.unravel_index(torch.arange(n, device=q.device), grid_shape(n, fixed))
    terms = [term[:, :, place[:, None], place].double() for term, place in zip(logits, places, strict=True)]
    gap = q.double() @ k.double().mT * q.shape[-1] ** -0.5 - sum(terms[1:], terms[0])
    hidden = torch.zeros_like(gap[:1], dtype=torch.bool)
    if key_padding_mask is not None:
        hidden = ~key_padding_mask[:, None, None, :]
    largest, least = gap.masked_fill(hidden, -torch.inf).amax(-1), gap.masked_fill(hidden, torch.inf).amin(-1)
    distance = torch.tanh((largest - least).nan_to_num(0.0).clamp_min(0) / 4)
    bound = distance * value_diameter(v.double(), causal=False, key_padding_mask=key_padding_mask)
    return bound.to(q.dtype) + (1 + len(logits)) * softmax_round_off(q, k, v)
