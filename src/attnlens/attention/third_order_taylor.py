"""Third-order attention with the exponential cut to its Taylor polynomial, whose monomials separate the two tokens.

    out_i = sum_jk T_p(s l_ijk) (v1_j * v2_k) / sum_jk T_p(s l_ijk),   T_p(x) = sum_{r <= p} x^r/r!,   s = 1/sqrt(d),
    l_ijk = sum_c q_ic k1_jc k2_kc,   j, k <= i if causal,
          = [psi'(q_i)^T (S1 * S2)] / [psi'(q_i)^T (z1 * z2)],   S_t = psi(K_t)^T V_t,   z_t = psi(K_t)^T 1,

psi all F = C(d + p, p) monomials of degree at most p, psi'_a = s^{|a|} psi_a / a!. The pairs are never formed: time
O(n F dv), memory O(n F + F dv), causal O(n F + chunk F dv) (n F dv under autograd), a causal state of 2 F (dv + 1)
numbers. p is even: then T_p > 0, every weight is positive and rows are stochastic over pairs. Target: `third_order` on
trilinear logits, reached for no finite p.

Bound, certain. g(x) = log T_p(x) - x decreases at even p, g' = -x^p / (p! T_p(x)). A weight changes by a factor between
e^{g(max)} and e^{g(min)}, max and min over the logits of the row, so that the total variation is at most
tanh((g(min) - g(max))/4), and the error at most that times the diameter of the values of pairs. With x = max |logit|
every weight is off by a relative e^x x^{p+1}/(p+1)! at most.

Sources: "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation"
(Alman, Song, 2023), https://arxiv.org/abs/2310.04064; "Tensor Attention Training: Provably Efficient Learning of
Higher-order Transformers" (Liang et al., 2024), https://arxiv.org/abs/2405.16411: near-linear time where entries are
bounded by o((log n)^{1/3}), which both need. Departures: the plain Taylor polynomial, of even degree; the causal form.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractRecurrentAttention
from attnlens.attention.third_order import third_order_naive
from attnlens.linalg.monomials import Monomials, evaluate, monomials, num_monomials
from attnlens.linalg.prefix import normalized

CHUNK = 16
MOST = 200_000


class PairState(NamedTuple):
    """psi(K_t)^T [V_t, 1] over the tokens so far, t = 1, 2."""

    first: Float[Tensor, "b h f dv1"]
    second: Float[Tensor, "b h f dv1"]


def log_ratio(x: Float[Tensor, "*any"], degree: int) -> Float[Tensor, "*any"]:
    """g of the module docstring."""
    total = term = torch.ones_like(x)
    for r in range(1, degree + 1):
        term = term * x / r
        total = total + term
    return total.log() - x


def contract(
    f_q: Float[Tensor, "b h n f"], first: Float[Tensor, "b h *#n f dv1"], second: Float[Tensor, "b h *#n f dv1"]
) -> Float[Tensor, "b h n dv"]:
    """psi'(q)^T (S1 * S2) over psi'(q)^T (z1 * z2); the sums are of all queries, or of each."""
    both = first * second
    sums = f_q @ both if both.ndim == 4 else (f_q[..., None, :] @ both).squeeze(-2)
    return normalized(sums[..., :-1], sums[..., -1])


def causal_taylor(
    features: tuple[Float[Tensor, "b h n f"], ...],
    values: tuple[Float[Tensor, "b h n dv1"], ...],
    state: PairState,
) -> tuple[PairState, Float[Tensor, "b h n dv"]]:
    """Prefix sums of psi(k) [v, 1]^T, a chunk at a time, from `state` on."""
    outs, sums = [], (state.first, state.second)
    for f_q, f_1, f_2, v_1, v_2 in zip(*(x.split(CHUNK, 2) for x in (*features, *values)), strict=True):
        own = (f[..., None] * v[..., None, :] for f, v in ((f_1, v_1), (f_2, v_2)))
        running = [past[:, :, None] + x.cumsum(2) for past, x in zip(sums, own, strict=True)]
        outs.append(contract(f_q, running[0], running[1]))
        sums = (running[0][:, :, -1], running[1][:, :, -1])
    return PairState(*sums), torch.cat(outs, 2)


class ThirdOrderTaylor(AbstractRecurrentAttention):
    """Third-order attention through monomials.

    Args:
        degree: p, even, at least 2; C(d + p, p) monomials.
        head_dim: d.

    Raises:
        ValueError: an odd degree or one below 2, or more than 200000 monomials.
    """

    family = "tensor"
    target = "third_order"
    budget = "degree"
    row_stochastic = True
    arity = 2
    pairwise = False

    def __init__(self, degree: int, head_dim: int) -> None:
        super().__init__()
        if degree < 2 or degree % 2:
            raise ValueError(
                f"`degree` must be even and at least 2, got {degree}: odd polynomials take negative values"
            )
        if num_monomials(head_dim, degree) > MOST:
            raise ValueError(
                f"`degree` {degree} at head_dim {head_dim} has {num_monomials(head_dim, degree)} monomials, more than "
                f"{MOST}: lower it, or use `third_order`"
            )
        self.degree, self.head_dim = degree, head_dim
        recipe = monomials(head_dim, degree)
        self.starts = recipe.starts
        self.parent: Tensor
        self.last: Tensor
        self.coefficient: Tensor
        self.register_buffer("parent", recipe.parent, persistent=False)
        self.register_buffer("last", recipe.last, persistent=False)
        order = torch.zeros_like(recipe.coefficient)
        for start in recipe.starts[:-1]:
            order[start:] += 1
        # Not persistent and in float64: weights of this operator are made from numbers alone.
        self.register_buffer("coefficient", recipe.coefficient * head_dim ** (-0.5 * order), persistent=False)

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d2"],
        v: Float[Tensor, "b h m dv2"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """Third-order attention pair by pair, in float64."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return third_order_naive(q.double(), k.double(), v.double(), **masks)

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d2"],
        v: Float[Tensor, "b h m dv2"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"]:
        """That of the module docstring, from all n x m x m logits: to be tested with, not to be streamed."""
        q, k, v = q.double(), k.double(), v.double()
        real = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        (k1, k2), (v1, v2) = (torch.where(real[:, None, :, None], x, 0).chunk(2, -1) for x in (k, v))
        logits = torch.einsum("bhnd,bhjd,bhkd->bhnjk", q, k1, k2) * q.shape[-1] ** -0.5
        seen = real[:, None, None, :].expand(*q.shape[:3], -1)
        seen = seen.tril() if causal else seen
        hidden = ~(seen[..., :, None] & seen[..., None, :])
        low = logits.masked_fill(hidden, torch.inf).amin((-2, -1))
        high = logits.masked_fill(hidden, -torch.inf).amax((-2, -1))
        variation = torch.tanh((log_ratio(low, self.degree) - log_ratio(high, self.degree)) / 4)
        pairs = v1[:, :, :, None] * v2[:, :, None]
        center = pairs.mean((2, 3), keepdim=True)
        return (variation * 2 * (pairs - center).norm(dim=-1).amax((-2, -1))[..., None]).nan_to_num(0)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d2"],
        v: Float[Tensor, "b h m dv2"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        features, values = self._features(q, k, v)
        if key_padding_mask is not None:
            # A zero key is not a missing one: its constant monomial is one.
            real = key_padding_mask[:, None, :, None]
            values = (torch.where(real, values[0], 0), torch.where(real, values[1], 0))
        if causal:
            return causal_taylor(features, values, self._empty(values[0]))[1]
        return contract(features[0], features[1].mT @ values[0], features[2].mT @ values[1])

    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> PairState:
        """Empty sums."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return self._empty(torch.empty(batch, num_heads, 0, value_dim + 1, dtype=dtype, device=like.device))

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d2"],
        v: Float[Tensor, "b h n dv2"],
    ) -> tuple[PairState, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens; time O(n F dv), whatever came before."""
        past = PairState(*state)
        features, values = self._features(*(x.to(past.first.dtype) for x in (q, k, v)))
        after, out = causal_taylor(features, values, past)
        return after, out.to(q.dtype)

    def _empty(self, values: Tensor) -> PairState:
        zeros = values.new_zeros(*values.shape[:2], self.starts[-1], values.shape[-1])
        return PairState(zeros, zeros)

    def _features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(psi'(q), psi(k1), psi(k2)) and ([v1, 1], [v2, 1])."""
        if q.shape[-1] != self.head_dim:
            raise ValueError(f"`q` has heads of {q.shape[-1]}, but the monomials are of {self.head_dim}: rebuild")
        recipe = Monomials(self.parent, self.last, self.coefficient, self.starts)
        f_q, f_1, f_2 = (evaluate(x, recipe) for x in (q, *k.chunk(2, -1)))
        ones = torch.ones_like(v[..., :1])
        first, second = (torch.cat([x, ones], -1) for x in v.chunk(2, -1))
        return (f_q * self.coefficient.to(q.dtype), f_1, f_2), (first, second)
