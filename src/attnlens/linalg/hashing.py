"""Locality-sensitive hashing: near vectors get near codes.

Hyperplane code of x in R^d from p random directions w_i: the bits [<w_i, x> > 0]. Two vectors at angle t agree in one
bit with probability 1 - t/pi, so in all with (1 - t/pi)^p. Codes are returned as the position of the bit pattern in the
Gray code, in which neighbors differ in one bit: sorting by it puts near buckets side by side.

Sources: "Similarity estimation techniques from rounding algorithms" (Charikar, 2002); the order of the buckets from
"HyperAttention: Long-context Attention in Near-Linear Time" (Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh, 2023).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def gray_position(bits: Bool[Tensor, "*k p"]) -> Int[Tensor, "*k"]:
    """Where a pattern stands in the Gray code: bit i of the position is the parity of bits 0..i, bit 0 the highest."""
    p = bits.shape[-1]
    parity = bits.long().cumsum(-1) % 2
    return (parity << torch.arange(p - 1, -1, -1, device=bits.device)).sum(-1)


def hyperplane_code(x: Float[Tensor, "b h n d"], planes: Float[Tensor, "h d p"]) -> Int[Tensor, "b h n"]:
    """The Gray position of the signs of <w_i, x>, w_i the columns of `planes`; 0 <= code < 2^p. No gradient."""
    return gray_position(x.detach() @ planes.to(x.dtype) > 0)
