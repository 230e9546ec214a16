"""Polynomial attention: the exponential kernel replaced by a power of the logit, with a one in the denominator.

    out_i = sum_j |c + s_ij|^p v_j / (1 + sum_j |c + s_ij|^p),   s_ij = <q_i, k_j>/sqrt(d),   j <= i if causal,

which is (c + s)^p at even p. With `normalize`, q_i and k_j are layer-normalized first. Time O(n m (d + dv)), memory
O(n d) and one chunk of rows in both passes: exact attention of another kernel, the target of `tensor_sketch`,
`polysketch` and `levattention`. Its target is its own definition. Its ends:

    p = 0:         every weight is 1/(m + 1), and the row sums to m/(m + 1), not to one;
    p -> infinity: if mu_i = max_j |c + s_ij| > 1, the mean of the values at which |c + s_ij| = mu_i; if mu_i < 1, zero;
    c = p -> infinity: softmax attention, since (p + s)^p = p^p e^s (1 + O(s^2/p)): the error falls like 1/p.

Source: "PolySketchFormer: Fast Transformers via Sketching Polynomial Kernels" (Kacham, Mirrokni, Zhong, 2023),
https://arxiv.org/abs/2310.01655. Departures: s has the factor 1/sqrt(d) of every other operator here, so that the
paper's one is d^{p/2} in these units; any real p = 0 or p >= 1, with the absolute value, since at odd p the signed
denominator may vanish; the layer norm is an option without parameters.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.attention.base import AbstractAttention
from attnlens.linalg.polynomial_kernel import dense, scaled, streamed


class Polynomial(AbstractAttention):
    """Exact attention with the kernel |c + s|^p.

    Args:
        degree: p, 0 or at least 1; below 1 the gradient at orthogonal vectors is infinite.
        constant: c, at least 0.
        normalize: layer-normalize queries and keys, as the paper does.
    """

    family = "kernel"
    target = "itself"
    one_query = True

    def __init__(self, degree: int | float, constant: int | float = 0, normalize: bool = False) -> None:
        super().__init__()
        if degree != 0 and not degree >= 1:
            raise ValueError(f"`degree` must be 0 or at least 1, got {degree}; even degrees are polynomials")
        if not constant >= 0:
            raise ValueError(f"`constant` must be at least 0, got {constant}")
        self.degree = degree
        self.constant = constant
        self.normalize = normalize

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
        """The definition with its matrix, in float64."""
        masks = {"causal": causal, "key_padding_mask": key_padding_mask}
        return dense(q.double(), k.double(), v.double(), self.degree, self.constant, self.normalize, **masks)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m dv"],
        *,
        causal: bool,
        key_padding_mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n dv"]:
        x, y = scaled(q, self.normalize), scaled(k, self.normalize)
        return streamed(x, y, v, self.degree, self.constant, causal=causal, key_padding_mask=key_padding_mask)
