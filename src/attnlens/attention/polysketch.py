"""PolySketchFormer: polynomial attention of even degree by self-tensored recursive sketches, exact near the diagonal.

    out_i = sum_j <phi(x_i), phi(y_j)>^2 v_j / (1 + sum_j <phi(x_i), phi(y_j)>^2),   x = d^{-1/4} q,   y = d^{-1/4} k,

phi = phi_{p/2} the recursive Gaussian sketch of `linalg.polynomial_sketch`, r entries, so that <phi(x), phi(y)>^2 >= 0
estimates <x, y>^p = (<q, k>/sqrt(d))^p. Squares are inner products of r (r + 1)/2 features, summed over keys first:
time O(n r^2 dv + n p r (d + r)), memory O(n r^2). Causal: blocks of `block_size` tokens use <x, y>^p itself among
themselves and sketches for the blocks before, O(n block_size (d + dv)) more. Target: `polynomial` with the same degree
and normalization, reached as r grows, and at block_size >= length where causal; exact in both forms at no finite r.

Squaring an unbiased estimate adds its variance: E <phi(x), phi(y)>^2 = <x, y>^p + Var <phi(x), phi(y)>, a bias upward
of at most ((1 + 8/r)^{p/2-1} - 1) |x|^p |y|^p. It weighs orthogonal pairs most, relative to their kernel value, and is
the price of weights that are not negative. Among Gaussian vectors, where <x, y>^2 is about |x|^2 |y|^2/d, r must exceed
d^{p/2} for less bias than signal. No order is declared: the bias falls like 1/r, the deviation like r^{-1/2}.

Source: "PolySketchFormer: Fast Transformers via Sketching Polynomial Kernels" (Kacham, Mirrokni, Zhong, 2023),
https://arxiv.org/abs/2310.01655. Departures: children of the recursion are independent draws (printed with one shared
child it is biased before any squaring); the factor 1/sqrt(d); layer norm without parameters, as an option; the
learned sketch is the same tree with its Gaussian matrices as parameters (paper: small networks in their place).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.polynomial_features import causal_kernel_sums, kernel_sums, self_tensored
from attnlens.linalg.polynomial_kernel import dense, kernel_values, scaled, with_sink
from attnlens.linalg.polynomial_sketch import draw_tree, recursive_sketch


def polysketch_attention(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    f_x: Float[Tensor, "b h n f"],
    f_y: Float[Tensor, "b h m f"],
    degree: int,
    block_size: int,
    *,
    causal: bool,
) -> Float[Tensor, "b h n dv"]:
    """Both forms, given scaled vectors and their self-tensored features; a padded key is zero in both."""
    if not causal:
        return with_sink(*kernel_sums(f_x, f_y, v))

    blocks = zip(x.split(block_size, 2), y.split(block_size, 2), strict=True)
    exact = [kernel_values(queries, keys, degree) for queries, keys in blocks]
    return with_sink(*causal_kernel_sums(f_x, f_y, v, exact, block_size))


class PolySketch(AbstractAttention):
    """Polynomial attention by recursive sketches.

    Args:
        num_features: r, entries of phi, at least 1; the kernel has r (r + 1)/2 features.
        degree: p, a power of two, at least 4; for degree 2 the exact features are x itself, self-tensored.
        head_dim: of queries and keys.
        num_heads: every head has its own draw.
        seed: of the draws.
        block_size: tokens that see each other exactly, causal only; the paper takes 1024.
        normalize: layer-normalize queries and keys, as the paper does.
        learned: whether the matrices of the sketch are parameters, which start at the draw.
    """

    family = "sketching"
    budget = "num_features"
    target = "polynomial"

    def __init__(
        self,
        num_features: int,
        degree: int,
        head_dim: int,
        num_heads: int,
        seed: int,
        block_size: int = 64,
        normalize: bool = True,
        learned: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if degree < 4 or degree & (degree - 1):
            raise ValueError(f"`degree` must be a power of two and at least 4, got {degree}; 4 and 8 are usual")
        self.degree = degree
        self.block_size = block_size
        self.normalize = normalize
        generator = torch.Generator().manual_seed(seed)
        leaves, inner = draw_tree(num_heads, degree // 2, head_dim, num_features, generator)
        self.leaves: Tensor
        self.inner: Tensor
        if learned:
            self.leaves, self.inner = nn.Parameter(leaves), nn.Parameter(inner)
        else:
            self.register_buffer("leaves", leaves)
            self.register_buffer("inner", inner)

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """Polynomial attention of the same degree and normalization, in float64."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return dense(q.double(), k.double(), v.double(), self.degree, 0, self.normalize, **masks)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        # A padded key is zero, layer-normalized too, and so are its kernel values and features.
        x, y = scaled(q, self.normalize), scaled(k, self.normalize)
        f_x, f_y = self_tensored(self.sketch(x)), self_tensored(self.sketch(y))
        return polysketch_attention(x, y, v, f_x, f_y, self.degree, self.block_size, causal=causal)

    def sketch(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n r"]:
        """phi of vectors that are scaled already."""
        num_heads, _, head_dim, _ = self.leaves.shape
        if (x.shape[1], x.shape[3]) != (num_heads, head_dim):
            raise ValueError(
                f"`q` has {x.shape[1]} heads of {x.shape[3]}, but the draws are for {num_heads} heads of {head_dim}: "
                "build with the `num_heads` and `head_dim` of the input"
            )
        return recursive_sketch(x, self.leaves.to(x.dtype), self.inner.to(x.dtype))
