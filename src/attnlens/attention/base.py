"""What an attention operator is: a map (q, k, v) -> out, with its theory declared on the class and held to by tests."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.linalg.dense import softmax_naive


class AbstractAttention(nn.Module, ABC):
    """An attention mechanism on projected queries, keys and values; no projection, dropout, rotation or cache inside.

    Shapes are (batch, heads, length, head_dim) everywhere, `key_padding_mask` is (batch, length) with True for a real
    token. A subclass is final, keeps its mathematics in a pure function of its file, and implements `attend`.

    Declared on the class:
        family: the group of the survey it belongs to ("exact", "null", "sparse", "clustering", "sampling",
            "low rank", "random features", "kernel", "recurrent", ...).
        budget: the constructor argument that trades cost for accuracy, or None.
        target: what it approximates ("softmax", ..., or "itself" when it is its own definition).
        causal: whether it can be causal; if not, asking for it is a ValueError.
        self_attention: whether queries and keys must be the same tokens (equal lengths; padding covers both).
        row_stochastic: whether every row of `matrix` is nonnegative and sums to one.
        arity: how many keys and how many values every token brings: `k` is [k1|...|k_arity] along its last axis, of
            width arity * d, and `v` likewise. Above 1 the operator weighs tuples of tokens.
        pairwise: whether out = P v for a matrix P of queries by keys, so that P can be compared with that of exact
            attention.
        rows_independent: whether an output row depends on its own query only (False where landmarks or sorting mix).
        order: error = O(budget^-order), or None where theory gives none.
        bound_probability: the probability with which `error_bound` holds (1.0: always).
        unbiased: whether `kernel`, the estimate that it normalizes, is unbiased over draws.
        host_step: the data-dependent step that keeps it off the meta device, or None.
        graph_break: why `torch.compile(fullgraph=True)` cannot take it, or None.
        native_half: whether its kernels keep statistics in float32 for half-precision inputs by themselves.
        caches: whether it is exact softmax attention, which decodes from a cache of keys and values.
        one_query: whether the last row of a causal run is that of its query alone over all keys with `causal=False`,
            so that it can continue from cached keys and values.
    """

    family: ClassVar[str]
    budget: ClassVar[str | None] = None
    target: ClassVar[str] = "softmax"
    causal: ClassVar[bool] = True
    self_attention: ClassVar[bool] = False
    row_stochastic: ClassVar[bool] = False
    arity: ClassVar[int] = 1
    pairwise: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    order: ClassVar[float | None] = None
    bound_probability: ClassVar[float] = 1.0
    unbiased: ClassVar[bool] = False
    host_step: ClassVar[str | None] = None
    graph_break: ClassVar[str | None] = None
    native_half: ClassVar[bool] = False
    caches: ClassVar[bool] = False
    one_query: ClassVar[bool] = False

    @abstractmethod
    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        """The method on checked inputs: at least float32, padded keys and values (and queries, where
        `self_attention`) already zero. A query that sees no key gives zero."""

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object] | None:
        """Constructor arguments with which the operator equals its target at this length, or None."""
        return None

    def error_bound(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m {self.arity}*d"],
        v: Float[Tensor, "b h m w"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n"] | None:
        """A bound on the Euclidean error of every output row against the target, or None."""
        return None

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m {self.arity}*d"],
        v: Float[Tensor, "b h m w"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n w//{self.arity}"]:
        """The naive float64 answer of the target; softmax attention unless the operator has another target."""
        return softmax_naive(q.double(), k.double(), v.double(), causal=causal, key_padding_mask=key_padding_mask)

    def calibrate(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> bool:
        """Fit what the operator learns from data without training, in place; whether there is anything to fit."""
        return False

    def kernel(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """The unnormalized kernel estimate of this draw, materialized; only where `unbiased` is declared."""
        raise NotImplementedError

    def kernel_target(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """What `kernel` estimates: exp(<q, k>/sqrt(d)) unless the operator has another target."""
        return torch.exp(q @ k.mT * q.shape[-1] ** -0.5)

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m {self.arity}*d"],
        v: Float[Tensor, "b h m w"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n w//{self.arity}"]:
        """Attention of `q` over `k` and `v`; the result has the dtype of `q`.

        Raises:
            ValueError: shapes that do not fit, or causal attention from an operator that cannot be causal.
        """
        self._check(q, k, v, causal, key_padding_mask)
        dtype = q.dtype
        if dtype in (torch.float16, torch.bfloat16) and not self.native_half:
            q, k, v = q.float(), k.float(), v.float()
        if key_padding_mask is not None:
            # Padding may hold anything, NaN included, and 0 * NaN is NaN: it is zeroed before any arithmetic.
            real = key_padding_mask[:, None, :, None]
            k, v = torch.where(real, k, 0), torch.where(real, v, 0)
            if self.self_attention:
                q = torch.where(real, q, 0)
        return self.attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask).to(dtype)

    def matrix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m {self.arity}*d"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """The matrix P~ that the operator applies to the values, obtained by applying it to the identity.

        At `arity` 2 and more the weights of tuples are summed over all their tokens but the first: values [I|1|...|1].
        """
        eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], k.shape[-2])
        if self.arity > 1:
            eye = torch.cat([eye, torch.ones_like(eye).repeat(1, 1, 1, self.arity - 1)], -1)
        return self(q, k, eye, causal=causal, key_padding_mask=key_padding_mask)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, key_padding_mask: Tensor | None) -> None:
        name = type(self).__name__
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
            raise ValueError(
                f"`q`, `k`, `v` must be (batch, heads, length, head_dim), got {q.ndim}, {k.ndim}, {v.ndim} axes"
            )
        if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or self.arity * q.shape[3] != k.shape[3]:
            raise ValueError(
                f"shapes do not fit: `q` {tuple(q.shape)}, `k` {tuple(k.shape)}, `v` {tuple(v.shape)}; "
                "repeat grouped key/value heads in the projection"
                + (f"; {name} takes {self.arity} keys side by side for every token" if self.arity > 1 else "")
            )
        if v.shape[3] % self.arity:
            raise ValueError(
                f"{name} takes {self.arity} values side by side for every token, got `v` of width {v.shape[3]}"
            )
        if min(q.shape[2], k.shape[2]) < 1:
            raise ValueError(f"lengths must be at least 1, got {q.shape[2]} queries and {k.shape[2]} keys")
        if key_padding_mask is not None and key_padding_mask.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"`key_padding_mask` must be {(k.shape[0], k.shape[2])}, got {tuple(key_padding_mask.shape)}"
            )
        if causal and not self.causal:
            raise ValueError(
                f"`causal=True` is not possible with {name}: its mathematics reads all tokens at once; "
                "use it on a bidirectional task or choose a causal operator"
            )
        if (causal or self.self_attention) and q.shape[2] != k.shape[2]:
            raise ValueError(
                f"{name} needs as many queries as keys here, got {q.shape[2]} and {k.shape[2]}; "
                "for decoding, give one query with `causal=False` over the keys so far"
            )


class AbstractRecurrentAttention(AbstractAttention):
    """A causal operator with a state of fixed size: the past enters only through a value that is passed along.

    The state is a NamedTuple of tensors; `step` returns a new one and never changes its argument.
    """

    one_query: ClassVar[bool] = True

    @abstractmethod
    def init_state(self, batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> tuple:
        """The state before the first token, on the device of `like` and in at least float32."""

    @abstractmethod
    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
    ) -> tuple[tuple, Float[Tensor, "b h n dv"]]:
        """Continue by n >= 1 tokens: the new state and their outputs, equal to those of one causal run."""
