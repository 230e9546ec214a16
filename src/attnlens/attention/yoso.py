"""YOSO attention: a key counts as often as its hash codes equal the query's, which is a Bernoulli variable each time.

With m independent codes of t hyperplane bits each, and theta_ij the angle between q_i and k_j,

    B_ij = (1/m) sum_r 1[code_r(q_i) = code_r(k_j)],   E B_ij = (1 - theta_ij / pi)^t,   Var B_ij = E B (1 - E B) / m,
    out_i = y_i / |y_i|,   y_i = sum_j B_ij v_j   (zero where y_i is).

Its target is the same with E B in place of B, which `expectation` computes in O(n^2 (d + dv)). The estimate needs no
pair: values are added into a table of 2^t rows a code, and a query reads the sum of its row. Time O(m n (t d + dv)),
memory O(n dv + 2^t dv) a code in flight. Causal, keys are sorted by (code, position), and a query reads the difference
of two running sums: from the start of its bucket to its own position. A row depends on its own query and on equality of
codes, so nothing leaks. Equals its target with `expectation`; else the error is O(m^{-1/2}).

Only angles matter: lengths of q and k, and so the scale of the logits, have no effect. Codes are hard: the gradient
with respect to q and k is zero. With `straight_through` it is that of the expectation, at the cost of the expectation.

Source: "You Only Sample (Almost) Once: Linear Cost Self-Attention Via Bernoulli Sampling" (Zeng, Xiong, Ravi, Acharya,
Fung, Singh, 2021), https://arxiv.org/abs/2111.09714. Departures: dense Gaussian planes in place of fast Hadamard
projections; the gradient is zero or that of the expectation, where the paper estimates a lower bound of the latter by
the same codes; no convolution on the values. `matrix` gives B, since the length of y depends on the values.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.blocks import take_rows
from attnlens.linalg.hashing import gray_position, table_sums

ROWS = 256
IN_FLIGHT = 2**22  # elements of gathered values at a time


def angular_kernel(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], num_bits: int) -> Float[Tensor, "b h n m"]:
    """(1 - theta_ij / pi)^num_bits; a zero vector is at a right angle to everything."""
    cosine = unit(q) @ unit(k).mT
    # The slope of arccos is infinite at 1; where round-off cannot tell the angle from zero it is taken as zero.
    edge = 1 - torch.finfo(q.dtype).eps
    return (1 - torch.arccos(cosine.clamp(-edge, edge)) / torch.pi).pow(num_bits)


def unit(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """x / |x|, and zero where x is."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def expected_sums(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m dv"], num_bits: int, causal: bool
) -> Float[Tensor, "b h n dv"]:
    """sum_j E B_ij v_j, `ROWS` queries at a time."""
    outs = []
    for start in range(0, q.shape[2], ROWS):
        stop = min(start + ROWS, q.shape[2])
        seen = stop if causal else k.shape[2]
        weights = angular_kernel(q[:, :, start:stop], k[:, :, :seen], num_bits)
        outs.append((weights.tril(start) if causal else weights) @ v[:, :, :seen])
    return torch.cat(outs, 2)


def expected_square(
    to_keys: Float[Tensor, "b h n m"],
    among_keys: Float[Tensor, "b h m m"],
    v: Float[Tensor, "b h m dv"],
    num_bits: int,
    causal: bool,
) -> Float[Tensor, "b h n"]:
    """E |sum_j 1[code(q_i) = code(k_j)] v_j|^2 for one code, from the probabilities that pairs agree in one bit."""
    gram, out = v @ v.mT, []
    for i in range(to_keys.shape[2]):
        own = to_keys[:, :, i]
        triple = (own[..., None] + own[..., None, :] + among_keys - 1) / 2
        product = triple.clamp_min(0).pow(num_bits) * gram
        out.append((product[..., : i + 1, : i + 1] if causal else product).sum((-2, -1)))
    return torch.stack(out, -1)


def codes(x: Float[Tensor, "b h n d"], planes: Float[Tensor, "h d bits"], num_bits: int) -> Int[Tensor, "b h r n"]:
    """One code of `num_bits` bits for every hash; without gradient."""
    bits = x.detach() @ planes.to(x.dtype) > 0
    return gray_position(bits.unflatten(-1, (-1, num_bits))).mT.contiguous()


def causal_sums(
    of_queries: Int[Tensor, "b h r n"], of_keys: Int[Tensor, "b h r n"], v: Float[Tensor, "b h n dv"]
) -> Float[Tensor, "b h n dv"]:
    """sum_r sum_{j <= i} 1[equal codes] v_j by running sums over the keys in the order of (code, position)."""
    (b, h, r, n), dv = of_queries.shape, v.shape[-1]
    position = torch.arange(n, device=v.device)
    ordered, order = (of_keys * n + position).sort(dim=-1)
    first = torch.searchsorted(ordered, of_queries * n)
    last = torch.searchsorted(ordered, of_queries * n + position, right=True)
    running = torch.cat([v.new_zeros(b, h, r, 1, dv), take_rows(v, order).cumsum(3)], 3).flatten(1, 2)
    both = take_rows(running, torch.stack([first, last], 3).flatten(1, 2))
    return (both[:, :, 1] - both[:, :, 0]).view(b, h, r, n, dv).sum(2)


def sampled_sums(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    planes: Float[Tensor, "h d bits"],
    num_bits: int,
    causal: bool,
) -> Float[Tensor, "b h n dv"]:
    """sum_j B_ij v_j, as many hashes at a time as keep the gathered values small."""
    num_hashes = planes.shape[-1] // num_bits
    size = q.shape[0] * q.shape[1] * (max(q.shape[2], k.shape[2]) + (0 if causal else 1 << num_bits)) * v.shape[-1]
    step = max(1, min(num_hashes, IN_FLIGHT // size))
    total = q.new_zeros(*q.shape[:3], v.shape[-1])
    for start in range(0, num_hashes, step):
        part = planes[..., start * num_bits : (start + step) * num_bits]
        of_queries, of_keys = codes(q, part, num_bits), codes(k, part, num_bits)
        sums = causal_sums(of_queries, of_keys, v) if causal else table_sums(of_queries, of_keys, v, 1 << num_bits)
        total = total + sums
    # A NaN query has the code of some healthy one: its row is made NaN.
    return total / num_hashes + q.detach().sum(-1, keepdim=True) * 0


class Yoso(AbstractAttention):
    """Bernoulli sampling attention with outputs of unit length.

    Args:
        num_hashes: codes of a token, at least 1; without effect on the result with `expectation`.
        num_bits: bits of a code, 1 to 16: the power of the kernel.
        head_dim: of queries and keys.
        num_heads: each has its own planes.
        seed: of the planes.
        expectation: whether to compute the expected kernel, which is exact and quadratic.
        straight_through: whether q and k receive the gradient of the expectation in place of zero.
    """

    family = "sampling"
    budget = "num_hashes"
    target = "yoso"
    order = 0.5
    unbiased = True
    bound_probability = 0.9
    one_query = True

    def __init__(
        self,
        num_hashes: int,
        num_bits: int,
        head_dim: int,
        num_heads: int,
        seed: int,
        expectation: bool = False,
        straight_through: bool = False,
    ) -> None:
        super().__init__()
        if num_hashes < 1:
            raise ValueError(f"`num_hashes` must be at least 1, got {num_hashes}")
        if not 1 <= num_bits <= 16:
            raise ValueError(f"`num_bits` must be 1 to 16, got {num_bits}: a table has 2^num_bits rows")
        if expectation and straight_through:
            raise ValueError("`straight_through` has no effect with `expectation`, got both: drop one of them")
        self.num_hashes, self.num_bits = num_hashes, num_bits
        self.expectation, self.straight_through = expectation, straight_through
        generator = torch.Generator().manual_seed(seed)
        self.planes: Tensor
        draw = torch.randn(num_heads, head_dim, num_hashes * num_bits, generator=generator, device="cpu")
        self.register_buffer("planes", draw)

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With the expected kernel."""
        return {"expectation": True}

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """sqrt(2 - 2 sqrt(1 - e^2)) with e = sqrt(10 E |y^_i - y_i|^2) / |y_i|, and 2 where e is not below 1: analysis.

        The m codes are independent, so E |y^_i - y_i|^2 = sum_jl (p_ijl - p_ij p_il) <v_j, v_l> / m for the probability
        p_ijl that query and both keys have equal codes: a plane through the origin leaves three vectors on one side
        with probability 1 - (theta_ij + theta_il + theta_jl) / (2 pi). Chebyshev: |y^ - y| < e |y| with probability
        0.9, and then y^ is at an angle of at most arcsin e to y, of which the bound is the chord. Round-off is added.
        """
        real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        rows, keys, values = q.double(), *(torch.where(real[:, None, :, None], x, 0).double() for x in (k, v))
        share = angular_kernel(rows, keys, 1)
        weights = share.pow(self.num_bits)
        weights = weights.tril() if causal else weights
        length = (weights @ values).norm(dim=-1)
        second = expected_square(share, angular_kernel(keys, keys, 1), values, self.num_bits, causal)
        variance = (second - length.square()).clamp_min(0) * (0 if self.expectation else 1 / self.num_hashes)
        # arccos near 1 turns a relative round-off eps into sqrt(eps).
        reach = (10 * variance).sqrt() + 8 * self.num_bits * torch.finfo(q.dtype).eps ** 0.5 * (
            weights @ values.norm(dim=-1, keepdim=True)
        ).squeeze(-1)
        sine = reach / torch.where(length > 0, length, 1)
        chord = (2 - 2 * (1 - sine.square()).clamp_min(0).sqrt()).sqrt()
        return torch.where((length > 0) & (sine < 1), chord, 2).to(q.dtype)

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """The expected kernel, materialized in float64, times the values, each row divided by its length."""
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            k, v = torch.where(real, k, 0), torch.where(real, v, 0)
        weights = angular_kernel(q.double(), k.double(), self.num_bits)
        return unit((weights.tril() if causal else weights) @ v.double())

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """B of this draw."""
        return self.matrix(q, k)

    def kernel_target(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """E B = (1 - theta / pi)^num_bits."""
        return angular_kernel(q, k, self.num_bits)

    def matrix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """B, before rows are divided by a length that depends on the values."""
        eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        self._check(q, k, eye, causal, key_padding_mask)
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, :, None]
            k, eye = torch.where(real, k, 0), torch.where(real, eye, 0)
        return self._sums(q, k, eye, causal)

    def _sums(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Float[Tensor, "b h n dv"]:
        if self.expectation:
            return expected_sums(q, k, v, self.num_bits, causal)
        sampled = sampled_sums(q, k, v, self.planes, self.num_bits, causal)
        if not self.straight_through:
            return sampled
        expected = expected_sums(q, k, v, self.num_bits, causal)
        return sampled.detach() + expected - expected.detach()

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        # Padding needs no mask: its values are zero, and they enter sums only.
        return unit(self._sums(q, k, v, causal))
