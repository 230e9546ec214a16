"""Tensor Sketch: polynomial attention from an unbiased sketch of the kernel, count sketches convolved by FFT.

    out_i = sum_j <phi(x_i), phi(y_j)> v_j / (1 + max(f_i, sum_j <phi(x_i), phi(y_j)>)),   phi in R^r,
    x = (d^{-1/4} q, sqrt(c)),   y = (d^{-1/4} k, sqrt(c)),   E <phi(x), phi(y)> = <x, y>^p = (c + <q, k>/sqrt(d))^p.

Sums over j are taken first: time O(n (p (d + r log r) + r dv)), memory O(n p r), a causal state of r (dv + 1) numbers.
Target: `polynomial` of the same degree, constant and normalization; reached for no finite r. The kernel estimate is
unbiased with variance at most (3^p - 1)/r |x|^{2p} |y|^{2p}: the error falls like r^{-1/2}, from a level that grows
like 3^{p/2} and like (|x| |y| / <x, y>)^p.

Estimates are signed: weights may be negative, and the sum of a row may be -1 or below although the true one is at
least 0 (p is even). The sum is held above f_i = |phi(x_i)| |sum_j phi(y_j)| / sqrt(r), its standard deviation if the
two vectors had nothing in common: where there is more noise than signal the row shrinks to a size of order one, instead
of growing like the noise, as it would with a sum held above 0. f_i falls like r^{-1/2} too. `self_tensored` squares a
sketch of degree p/2 instead: no negative weight and no floor, a bias upward, r (r + 1)/2 features; `unbiased` and
`order` are then withdrawn.

Source: "Fast and scalable polynomial kernels via explicit feature maps" (Pham, Pagh, 2013) and "Tensor Sketch: Fast and
Scalable Polynomial Kernel Approximation" (Pham, Pagh, 2025), https://arxiv.org/abs/2505.08146. Departures: fully
independent buckets and signs; the sink and the floor, since the sources do not normalize.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.linalg.count_sketch import draw_hashes, tensor_sketch
from attnlens.linalg.polynomial_features import kernel_sums, self_tensored, with_ones
from attnlens.linalg.polynomial_kernel import dense, kernel_values, scaled, with_sink
from attnlens.linalg.scan import chunked_scan


class TensorSketchState(NamedTuple):
    """sum_j phi(y_j) [v_j, 1]^T over the keys so far."""

    moment: Float[Tensor, "b h m dv1"]


def causal_sums(
    f_x: Float[Tensor, "b h n m"],
    f_y: Float[Tensor, "b h n m"],
    v: Float[Tensor, "b h n dv"],
    past: Float[Tensor, "b h m dv1"] | None = None,
    final_state: bool = False,
) -> tuple[Float[Tensor, "b h m dv1"] | None, Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """The moments after the last token where asked for, numerator and mass over the keys up to each query."""
    moment, sums = chunked_scan(f_x, f_y, with_ones(v), state=past, final_state=final_state)
    return moment, sums[..., :-1], sums[..., -1]


def noise_floor(f_x: Float[Tensor, "b h n r"], total: Float[Tensor, "b h #n r"]) -> Float[Tensor, "b h n"]:
    """f_i, `total` the sum of phi(y_j) over the keys that row i sees."""
    return f_x.norm(dim=-1) * total.norm(dim=-1) * f_x.shape[-1] ** -0.5


def chebyshev_bound(
    x: Float[Tensor, "b h n d"],
    y: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    out: Float[Tensor, "b h n dv"],
    degree: int,
    num_features: int,
    visible: Float[Tensor, "b h n m"],
    floor: Float[Tensor, "b h n"],
) -> Float[Tensor, "b h n"]:
    """A bound on the error of every row that fails with probability 0.1 at most.

    With T_i = sum_j y_j^p (x) (v_j - out_i), the error of the numerator less out_i times that of the mass has second
    moment at most (2 + 3^p)/r |x_i|^{2p} |T_i|^2, and |T_i|^2 = sum_jl <y_j, y_l>^p <v_j - out_i, v_l - out_i>; the
    mass alone, with 1 in place of v_j - out_i. Chebyshev's inequality at 0.05 for each. What the floor adds to the mass
    is at most the floor less the smallest mass, and counts times |out_i|.
    """
    gram = kernel_values(y, y, degree)
    spread = visible * (visible @ gram)
    mass = spread.sum(-1)
    squares = (visible * (visible @ (gram * (v @ v.mT)))).sum(-1)
    centered = squares - 2 * (out * (spread @ v)).sum(-1) + out.square().sum(-1) * mass
    level = 20 * (2 + 3**degree) / num_features * x.square().sum(-1) ** degree
    of_sum, of_mass = ((level * part.clamp_min(0)).sqrt() for part in (centered, mass))
    total = (kernel_values(x, y, degree) * visible).sum(-1)
    least = total - of_mass
    raised = out.norm(dim=-1) * (floor - least).clamp_min(0)
    return (of_sum + raised) / (1 + least.maximum(floor))


class TensorSketch(AbstractRecurrentAttention):
    """Polynomial attention by tensor sketches, with its own draw for every head.

    Args:
        num_features: r, at least 1.
        degree: p, even, at least 2.
        head_dim: of queries and keys.
        num_heads: every head has its own draw.
        seed: of the draws.
        constant: c, at least 0.
        normalize: layer-normalize queries and keys.
        self_tensored: square a sketch of degree p/2.
    """

    family = "sketching"
    budget = "num_features"
    target = "polynomial"
    order = 0.5
    unbiased = True
    bound_probability = 0.9

    def __init__(
        self,
        num_features: int,
        degree: int,
        head_dim: int,
        num_heads: int,
        seed: int,
        constant: int | float = 0,
        normalize: bool = False,
        self_tensored: bool = False,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"`num_features` must be at least 1, got {num_features}")
        if degree < 2 or degree % 2:
            raise ValueError(f"`degree` must be even and at least 2, got {degree}; odd kernels have no normalizer")
        if not constant >= 0:
            raise ValueError(f"`constant` must be at least 0, got {constant}")
        self.num_features = num_features
        self.degree = degree
        self.constant = constant
        self.normalize = normalize
        self.self_tensored = self_tensored
        if self_tensored:
            # What the class declares holds for the signed estimate.
            self.unbiased, self.order = False, None  # pyright: ignore[reportAttributeAccessIssue]
        generator = torch.Generator().manual_seed(seed)
        dim, depth = head_dim + (constant > 0), degree // 2 if self_tensored else degree
        buckets, signs = draw_hashes(num_heads, depth, dim, num_features, generator)
        self.buckets: Tensor
        self.signs: Tensor
        self.register_buffer("buckets", buckets)
        self.register_buffer("signs", signs)

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """<phi(x_i), phi(y_j)>, the estimate of (c + <q_i, k_j>/sqrt(d))^p; squared where `self_tensored`."""
        return self.features(q) @ self.features(k).mT

    def kernel_target(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """(c + <q, k>/sqrt(d))^p."""
        return kernel_values(self._augmented(q), self._augmented(k), self.degree)

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """Polynomial attention of the same degree, constant and normalization, in float64."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return dense(q.double(), k.double(), v.double(), self.degree, self.constant, self.normalize, **masks)

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"] | None:
        """`chebyshev_bound`, from n x m matrices: for analysis. None where `self_tensored`."""
        if self.self_tensored:
            return None
        q, k, v = q.double(), k.double(), v.double()
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            k, v = torch.where(real, k, 0), torch.where(real, v, 0)
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        visible = kernel_values(torch.zeros_like(q), torch.zeros_like(k), 0, 1, **masks)
        out = self.reference(q, k, v, **masks)
        x, y = self._augmented(q), self._augmented(k)
        floor = noise_floor(self.features(q), visible @ self.features(k))
        return chebyshev_bound(x, y, v, out, self.degree, self.num_features, visible, floor)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        f_x, f_y = self.features(q), self.features(k)
        if key_padding_mask is not None and self.constant > 0:
            # A zero key has the kernel value c^p.
            f_y = torch.where(key_padding_mask[:, None, :, None], f_y, 0)
        numerator, mass = causal_sums(f_x, f_y, v)[1:] if causal else kernel_sums(f_x, f_y, v)
        return self._normalized(numerator, mass, f_x, f_y.cumsum(2) if causal else f_y.sum(2, keepdim=True))

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> TensorSketchState:
        """Empty sums."""
        r = self.num_features
        width = r * (r + 1) // 2 if self.self_tensored else r
        dtype = torch.promote_types(like.dtype, torch.float32)
        return TensorSketchState(torch.zeros(batch, num_heads, width, value_dim + 1, dtype=dtype, device=like.device))

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[TensorSketchState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n (p (d + r log r) + r dv)), whatever came before."""
        past = TensorSketchState(*state).moment
        f_x, f_y = (self.features(each.to(past.dtype)) for each in (q, k))
        moment, numerator, mass = causal_sums(f_x, f_y, v.to(past.dtype), past, final_state=True)
        assert moment is not None
        total = past[..., -1][:, :, None] + f_y.cumsum(2)
        return TensorSketchState(moment), self._normalized(numerator, mass, f_x, total).to(q.dtype)

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n m"]:
        """phi of queries or keys, self-tensored if asked for."""
        num_heads, _, dim = self.signs.shape
        x = self._augmented(x)
        if (x.shape[1], x.shape[3]) != (num_heads, dim):
            raise ValueError(
                f"`q` has {x.shape[1]} heads, but the draws are for {num_heads} heads; or its head_dim differs: "
                "build with the `num_heads` and `head_dim` of the input"
            )
        phi = tensor_sketch(x, self.buckets, self.signs, self.num_features)
        return self_tensored(phi) if self.self_tensored else phi

    def _normalized(self, numerator: Tensor, mass: Tensor, f_x: Tensor, total: Tensor) -> Tensor:
        """The estimate of the mass held above its noise, unless it is a sum of squares."""
        return with_sink(numerator, mass if self.self_tensored else mass.maximum(noise_floor(f_x, total)))

    def _augmented(self, x: Tensor) -> Tensor:
        """(d^{-1/4} x, sqrt(c)), layer-normalized before if asked for."""
        x = scaled(x, self.normalize)
        return F.pad(x, (0, 1), value=self.constant**0.5) if self.constant > 0 else x
