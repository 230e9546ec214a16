"""Linformer: attention to a few combinations of the keys and values along the sequence.

    out = softmax(s Q (E K)^T) (F V),   E, F of shape (num_keys, m),   s = 1/sqrt(d).

E and F do not look at the content: they are learned, segment means, or a random draw (`projection`). Time
O((n + m) num_keys d), memory O(n d + num_keys (m + d)). Equals softmax attention with segment means (each token a
segment) when num_keys >= m, and with learned matrices where both are the identity.

No order and no bound is declared. The theorem of the paper is about exp(S) E^T for a rescaled E; softmax of randomly
projected keys does not approach softmax attention however large num_keys is. Not causal: every combination reads the
whole sequence.

Source: "Linformer: Self-Attention with Linear Complexity" (Wang, Li, Khabsa, Fang, Ma, 2020),
https://arxiv.org/abs/2006.04768. Departures: matrices per head; learned ones start as segment means instead of noise,
so that the first step already has a sensible output; column j is the j-th real token. With matrices of a fixed longest
length, keys made of padding alone are zero keys and still take part in the softmax, as in the paper; segment means
follow each example's own length instead.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.length_projection import AbstractLengthProjection, Pooled
from attnlens.linalg.partial import partial_attention


def linformer_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    projection: AbstractLengthProjection,
    key_padding_mask: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n dv"]:
    """Softmax attention over the projected keys and values."""
    keys, values, bias = projection(k, v, key_padding_mask)
    return partial_attention(q, keys, values, bias=bias)[0]


class Linformer(AbstractAttention):
    """Attention over keys and values projected along the sequence.

    Args:
        num_keys: projected keys, at least 1.
        projection: `Pooled` (default), `Learned` or `JohnsonLindenstrauss` of attnlens.linalg.length_projection; it is
            sized here and belongs to this operator from then on.
    """

    family = "low rank"
    budget = "num_keys"
    causal = False

    def __init__(self, num_keys: int, projection: AbstractLengthProjection | None = None) -> None:
        super().__init__()
        if num_keys < 1:
            raise ValueError(f"`num_keys` must be at least 1, got {num_keys}")
        self.projection = Pooled() if projection is None else projection
        self.projection.allocate(num_keys)

    @classmethod
    def exact_at(cls, length: int) -> dict[str, object]:
        """With every token its own segment."""
        return {"num_keys": length, "projection": Pooled()}

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        return linformer_attention(q, k, v, self.projection, key_padding_mask)
