"""Count sketches of vectors, and of their tensor powers by FFT.

A count sketch sums the coordinates of x with random signs into r buckets, (C x)_b = sum_{i: h(i) = b} s(i) x_i, and

    E <C x, C y> = <x, y>,   Var <C x, C y> = (sum_{i != j} x_i^2 y_j^2 + x_i y_i x_j y_j) / r <= 2 |x|^2 |y|^2 / r.

The circular convolution of p independent sketches of x is a count sketch of its p-th tensor power, with buckets
h_1(i_1) + ... + h_p(i_p) mod r: nothing of size d^p is formed. With phi(x) = FFT^{-1}(prod_t FFT(C_t x)),

    E <phi(x), phi(y)> = <x, y>^p,   Var <phi(x), phi(y)> <= (3^p - 1)/r |x|^{2p} |y|^{2p}.

For phi applied to general tensors T, U in place of powers, E <phi(T), phi(U)> = <T, U> with variance at most
(2 + 3^p)/r |T|^2 |U|^2. Time O(p (d + r log r)) a vector. Buckets and signs are drawn independently, which is more
than the 2-wise and 4-wise independence that the moments need.

Sources: "Fast and scalable polynomial kernels via explicit feature maps" (Pham, Pagh, 2013) and "Tensor Sketch"
(Pham, Pagh, 2025), https://arxiv.org/abs/2505.08146; general tensors: "Subspace Embeddings for the Polynomial Kernel"
(Avron, Nguyen, Woodruff, 2014).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def draw_hashes(
    num_heads: int, degree: int, dim: int, num_features: int, generator: torch.Generator
) -> tuple[Int[Tensor, "h p d"], Float[Tensor, "h p d"]]:
    """Buckets in 0..num_features - 1 and signs of `degree` count sketches a head."""
    shape = (num_heads, degree, dim)
    buckets = torch.randint(num_features, shape, generator=generator, device="cpu")
    signs = torch.randint(2, shape, generator=generator, device="cpu") * 2.0 - 1.0
    return buckets, signs


def count_sketches(
    x: Float[Tensor, "b h n d"], buckets: Int[Tensor, "h p d"], signs: Float[Tensor, "h p d"], num_features: int
) -> Float[Tensor, "b h p n r"]:
    """C_t x for every t."""
    signed = x[:, :, None] * signs.to(x.dtype)[None, :, :, None]
    out = torch.zeros(*signed.shape[:-1], num_features, dtype=x.dtype, device=x.device)
    return out.scatter_add(-1, buckets[None, :, :, None].expand(signed.shape), signed)


def tensor_sketch(
    x: Float[Tensor, "b h n d"], buckets: Int[Tensor, "h p d"], signs: Float[Tensor, "h p d"], num_features: int
) -> Float[Tensor, "b h n r"]:
    """phi(x), the count sketch of the p-th tensor power of every vector."""
    spectra = torch.fft.rfft(count_sketches(x, buckets, signs, num_features))
    product = spectra[:, :, 0]
    # Not `prod`, whose gradient looks for zeros on the host.
    for t in range(1, spectra.shape[2]):
        product = product * spectra[:, :, t]
    return torch.fft.irfft(product, n=num_features)
