"""Locality-sensitive hashing: near vectors get near codes, and sums over all keys with one code need no pair.

Three families, each with the probability that two vectors agree in one function of it:

- hyperplanes, w_i in R^d: the bits [<w_i, x> > 0]. At angle t a bit agrees with probability 1 - t/pi, and p bits with
  (1 - t/pi)^p. Codes are returned as the position of the bit pattern in the Gray code, in which neighbors differ in
  one bit: sorting by it puts near buckets side by side.
- cross-polytope with Gaussian directions: argmax over [<w_i, x>; -<w_i, x>], i = 1..k, which has 2 k values. The
  probability falls with the angle, from 1 to 1/(2 k) at a right angle and to 0 at pi; for k = 1 it is 1 - t/pi.
- cells of a line (E2LSH): floor((<w, x> + b) / r) with b uniform in [0, r). At Euclidean distance u, with s = r / u,
  p(u) = erf(s / sqrt 2) - sqrt(2/pi) (1 - e^{-s^2/2}) / s, falling in u from 1 to 0.

Sources: "Similarity estimation techniques from rounding algorithms" (Charikar, 2002); "Practical and optimal LSH for
angular distance" (Andoni, Indyk, Laarhoven, Razenshteyn, Schmidt, 2015), whose random rotation is replaced by k
Gaussian directions as in "Reformer" (Kitaev, Kaiser, Levskaya, 2020); "Locality-sensitive hashing scheme based on
p-stable distributions" (Datar, Immorlica, Indyk, Mirrokni, 2004); the order of the buckets from "HyperAttention:
Long-context Attention in Near-Linear Time" (Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh, 2023).
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.blocks import scores_at_once, take_rows


def gray_position(bits: Bool[Tensor, "*k p"]) -> Int[Tensor, "*k"]:
    """Where a pattern stands in the Gray code: bit i of the position is the parity of bits 0..i, bit 0 the highest."""
    p = bits.shape[-1]
    parity = bits.long().cumsum(-1) % 2
    return (parity << torch.arange(p - 1, -1, -1, device=bits.device)).sum(-1)


def hyperplane_code(x: Float[Tensor, "b h n d"], planes: Float[Tensor, "h d p"]) -> Int[Tensor, "b h n"]:
    """The Gray position of the signs of <w_i, x>, w_i the columns of `planes`; 0 <= code < 2^p. No gradient."""
    return gray_position(x.detach() @ planes.to(x.dtype) > 0)


def polytope_buckets(x: Float[Tensor, "b h n d"], rotations: Float[Tensor, "h d r k"]) -> Int[Tensor, "b h r n"]:
    """argmax([W_r x; -W_r x]) in 0 .. 2 k - 1 for every round; a single bucket where k = 0. No gradient."""
    r, k = rotations.shape[2:]
    if k == 0:
        return torch.zeros(*x.shape[:2], r, x.shape[2], dtype=torch.long, device=x.device)
    rotations = rotations.flatten(2).to(x.dtype)
    # A few rows at once, passed over several times: all n r k projections would be the largest tensor of the methods
    # that hash, and on a CPU pieces of half a megabyte take half the time of two.
    rows_at_once = max(1, scores_at_once(x) // 8 // (x.shape[0] * rotations.shape[0] * r * k))
    parts = [_largest((rows @ rotations).unflatten(-1, (r, k))) for rows in x.detach().split(rows_at_once, 2)]
    return torch.cat(parts, 2).transpose(2, 3).contiguous()


def first_largest(x: Float[Tensor, "*n k"]) -> Int[Tensor, "*n"]:
    """argmax over the last axis, at a tie the smallest index; any index where x holds NaN. No gradient.

    By vectorized passes: on a CPU argmax reads one number at a time, which takes twice as long.
    """
    k, x = x.shape[-1], x.detach()
    backwards = torch.arange(k, 0, -1, dtype=x.dtype, device=x.device)
    found = (x - x.amax(-1, keepdim=True)).eq_(0).mul_(backwards).amax(-1)
    return (k - found).long().clamp(0, k - 1)


def _largest(w: Float[Tensor, "*n k"]) -> Int[Tensor, "*n"]:
    """argmax [w; -w], at a tie the smallest i."""
    index = first_largest(w.abs())
    return index + w.shape[-1] * (w.gather(-1, index[..., None])[..., 0] < 0)


def line_cells(
    x: Float[Tensor, "b h n d"], directions: Float[Tensor, "h d p"], offsets: Float[Tensor, "h p"], width: float
) -> Int[Tensor, "b h n p"]:
    """floor((<w_i, x> + b_i) / width) for the columns w_i of `directions` and 0 <= b_i < width. No gradient."""
    projected = x.detach() @ directions.to(x.dtype) + offsets[:, None].to(x.dtype)
    return (projected / width).floor().long()


def line_collision(distance: Float[Tensor, "*k"], width: float) -> Float[Tensor, "*k"]:
    """The probability p(u) that one cell of `width` holds two vectors at this distance; differentiable at 0 too."""
    # Below width / 50 both exponentials are 0 in float64: the quotient may stop there.
    s = width / distance.clamp_min(width / 50)
    return torch.erf(s / math.sqrt(2)) - math.sqrt(2 / math.pi) / width * distance * -torch.expm1(-s.square() / 2)


def fused_code(cells: Int[Tensor, "*k p"], multipliers: Int[Tensor, " p"]) -> Int[Tensor, "*k"]:
    """One number for a tuple: sum_i a_i c_i modulo 2^64.

    With a_i uniform over all 64-bit numbers, two different tuples whose entries differ by less than 2^e share a code
    with probability 2^{e - 64} at most.
    """
    return (cells * multipliers).sum(-1)


def shared_ids(
    of_queries: Int[Tensor, "*k n"], of_keys: Int[Tensor, "*k m"]
) -> tuple[Int[Tensor, "*k n"], Int[Tensor, "*k m"]]:
    """Codes of any size renamed to 0 .. m - 1, equal for equal codes; m for a query whose code no key has."""
    m = of_keys.shape[-1]
    ordered = of_keys.sort(dim=-1).values
    place = torch.searchsorted(ordered, of_queries)
    found = ordered.gather(-1, place.clamp(max=m - 1)) == of_queries
    return torch.where(found, place, m), torch.searchsorted(ordered, of_keys)


def table_sums(
    of_queries: Int[Tensor, "b h r n"], of_keys: Int[Tensor, "b h r m"], v: Float[Tensor, "b h m dv"], num_codes: int
) -> Float[Tensor, "b h n dv"]:
    """sum_r sum_j 1[equal codes] v_j for codes in 0 .. num_codes - 1, by a table of that many rows for every r."""
    (b, h, r, n), (m, dv) = of_queries.shape, v.shape[2:]
    row = (torch.arange(b * h * r, device=v.device) * num_codes).view(b, h, r, 1)
    values = v[:, :, None].expand(b, h, r, m, dv).reshape(-1, dv)
    table = v.new_zeros(b * h * r * num_codes, dv).index_add(0, (of_keys + row).flatten(), values)
    return table.index_select(0, (of_queries + row).flatten()).view(b, h, r, n, dv).sum(2)


def segment_sums(x: Float[Tensor, "*k n d"], segment: Int[Tensor, "*k n"]) -> Float[Tensor, "*k n d"]:
    """Running sums that start anew with every segment of equal neighbors; log2 n passes.

    A difference of sums that run over all rows would carry the round-off, or the infinity, of one segment into others.
    """
    step = 1
    while step < x.shape[-2]:
        same = (segment[..., step:] == segment[..., :-step])[..., None]
        x = torch.cat([x[..., :step, :], x[..., step:, :] + torch.where(same, x[..., :-step, :], 0)], -2)
        step *= 2
    return x


def causal_table_sums(
    of_queries: Int[Tensor, "b h r n"], of_keys: Int[Tensor, "b h r n"], v: Float[Tensor, "b h n dv"]
) -> Float[Tensor, "b h n dv"]:
    """sum_r sum_{j <= i} 1[equal codes] v_j by running sums over the keys in the order of (code, position)."""
    (b, h, r, n), dv = of_queries.shape, v.shape[-1]
    position = torch.arange(n, device=v.device)
    ordered, order = (of_keys * n + position).sort(dim=-1)
    code = ordered // n
    running = segment_sums(take_rows(v, order), code).flatten(1, 2)
    last = torch.searchsorted(ordered, of_queries * n + position, right=True) - 1
    place = last.clamp_min(0)
    seen = (last >= 0) & (code.gather(-1, place) == of_queries)
    return torch.where(seen[..., None], take_rows(running, place.flatten(1, 2)).view(b, h, r, n, dv), 0).sum(2)
