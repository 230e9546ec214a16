"""No attention at all: every token keeps its own value.

    out_i = v_i

The null row that says what the rest of a model does without mixing tokens. Time and memory O(n d).
"""

from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention


class Identity(AbstractAttention):
    """The null operator out = v."""

    family = "null"
    target = "itself"
    self_attention = True
    row_stochastic = True

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """It is its own definition."""
        return {}

    def reference(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool = False,
        key_padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b h n dv"]:
        """The values themselves, in float64."""
        return v.double()

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        # A query that holds NaN must not look healthy, although its value plays no role.
        return v + q.sum(-1, keepdim=True) * 0
