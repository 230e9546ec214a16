"""Feature maps of the softmax kernel, each with the attention that its range and its signs ask for.

With x = d^{-1/4} q, y = d^{-1/4} k and rows w_f of the draws, all unbiased for e^{<x, y>}:

    positive       e^{-|x|^2/2} m^{-1/2} (e^{<w_f, x>})_f,
    hyperbolic     e^{-|x|^2/2} (2m)^{-1/2} (e^{<w_f, x>}, e^{-<w_f, x>})_f,
    trigonometric  e^{|x|^2/2} m^{-1/2} (sin <w_f, x>, cos <w_f, x>)_f.

The first two are positive: sums of their logarithms (`linalg.feature_scan`), rows that sum to one. The third is signed:
a row below its noise is drawn to the mean, every key carries its scale e^{|y|^2/2} (`linalg.leveled_features`).
Their variances are in `linalg.random_features`.

Source: "Rethinking Attention with Performers" (Choromanski et al., 2021), https://arxiv.org/abs/2009.14794.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.linalg.feature_scan import (
    FeatureState,
    LogLinear,
    bidirectional_features,
    causal_features,
    empty_features,
)
from attnlens.linalg.leveled_features import LeveledState, empty_leveled, leveled_attention, leveled_step
from attnlens.linalg.random_features import positive_log_features


class AbstractFeatureMap(ABC):
    """A map to features, and attention with it. `w` is (batch, heads, m, head_dim), tokens are unscaled.

    Attributes:
        row_stochastic: whether weights are nonnegative and rows sum to one.
    """

    row_stochastic: ClassVar[bool]

    @abstractmethod
    def features(self, x: Float[Tensor, "b h n d"], w: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n r"]:
        """Explicit features of scaled tokens x, whose products estimate e^{<x, y>}: for analysis."""

    @abstractmethod
    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h l d"],
        v: Float[Tensor, "b h l dv"],
        w: Float[Tensor, "b h m d"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        """Attention with the kernel replaced by the products of features."""

    @abstractmethod
    def init_state(self, batch: int, num_heads: int, m: int, value_dim: int, like: Tensor) -> tuple:
        """The state before the first token, for m draws."""

    @abstractmethod
    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        w: Float[Tensor, "b h m d"],
    ) -> tuple[tuple, Float[Tensor, "b h n dv"]]:
        """Continue by n tokens in the precision of the state."""


def log_linear(w: Float[Tensor, "b h m d"]) -> LogLinear:
    """The logarithms of positive features of unscaled tokens: <w, x>, and <w, y> - |y|^2/2."""
    return LogLinear(w * w.shape[-1] ** -0.25)


class Positive(AbstractFeatureMap):
    """e^{-|x|^2/2} m^{-1/2} (e^{<w_f, x>})_f: FAVOR+."""

    row_stochastic = True

    def features(self, x: Float[Tensor, "b h n d"], w: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        return positive_log_features(x, w).exp()

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h l d"],
        v: Float[Tensor, "b h l dv"],
        w: Float[Tensor, "b h m d"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        if causal:
            return causal_features(log_linear(w), q, k, v, key_padding_mask)[1]
        return bidirectional_features(log_linear(w), q, k, v, key_padding_mask)

    def init_state(self, batch: int, num_heads: int, m: int, value_dim: int, like: Tensor) -> FeatureState:
        return empty_features(batch, num_heads, m, value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        w: Float[Tensor, "b h m d"],
    ) -> tuple[FeatureState, Float[Tensor, "b h n dv"]]:
        after, out = causal_features(log_linear(w), q, k, v, state=FeatureState(*state), final_state=True)
        assert after is not None
        return after, out


class Hyperbolic(AbstractFeatureMap):
    """e^{-|x|^2/2} (2m)^{-1/2} (e^{<w_f, x>}, e^{-<w_f, x>})_f: positive features of draws in opposite pairs."""

    row_stochastic = True

    def features(self, x: Float[Tensor, "b h n d"], w: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n r"]:
        return Positive().features(x, _pairs(w))

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h l d"],
        v: Float[Tensor, "b h l dv"],
        w: Float[Tensor, "b h m d"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return Positive().attend(q, k, v, _pairs(w), causal=causal, key_padding_mask=key_padding_mask)

    def init_state(self, batch: int, num_heads: int, m: int, value_dim: int, like: Tensor) -> FeatureState:
        return empty_features(batch, num_heads, 2 * m, value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        w: Float[Tensor, "b h m d"],
    ) -> tuple[FeatureState, Float[Tensor, "b h n dv"]]:
        return Positive().step(state, q, k, v, _pairs(w))


def _pairs(w: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h r d"]:
    return torch.cat([w, -w], 2)


class Trigonometric(AbstractFeatureMap):
    """e^{|x|^2/2} m^{-1/2} (sin <w_f, x>, cos <w_f, x>)_f."""

    row_stochastic = False

    def features(self, x: Float[Tensor, "b h n d"], w: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n r"]:
        return _waves(x, w) * (x.square().sum(-1, keepdim=True) / 2).exp() * w.shape[2] ** -0.5

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h l d"],
        v: Float[Tensor, "b h l dv"],
        w: Float[Tensor, "b h m d"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b l"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        x, y = (t * t.shape[-1] ** -0.25 for t in (q, k))
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return leveled_attention(_waves(x, w), _waves(y, w), y.square().sum(-1) / 2, v, **masks)

    def init_state(self, batch: int, num_heads: int, m: int, value_dim: int, like: Tensor) -> LeveledState:
        return empty_leveled(batch, num_heads, 2 * m, value_dim, like)

    def step(
        self,
        state: tuple,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n dv"],
        w: Float[Tensor, "b h m d"],
    ) -> tuple[LeveledState, Float[Tensor, "b h n dv"]]:
        x, y = (t * t.shape[-1] ** -0.25 for t in (q, k))
        return leveled_step(LeveledState(*state), _waves(x, w), _waves(y, w), y.square().sum(-1) / 2, v)


def _waves(x: Float[Tensor, "b h n d"], w: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n r"]:
    angle = x @ w.mT
    return torch.cat([angle.sin(), angle.cos()], -1)
