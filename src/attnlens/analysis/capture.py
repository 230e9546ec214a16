"""Captured queries, keys and values: what a trained model's operators received on test inputs."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.analysis import error, frontier
from attnlens.linalg.dense import softmax_weights


class Capture(NamedTuple):
    """Q, K, V of one layer, the mask they were attended under, and exact attention on them in float64.

    baseline: relative error of answering with the mean of the visible values, a head.
    scale: ‖P‖ ‖V‖ in operator norm.
    """

    layer: int
    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n dv"]
    causal: bool
    key_padding_mask: Bool[Tensor, "b n"] | None
    exact: frontier.Frontier
    baseline: list[float]
    scale: Float[Tensor, "b h"]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What an operator is called with, beside its masks."""
        return self.q, self.k, self.v

    @property
    def masks(self) -> dict[str, Any]:
        """The keyword arguments of an operator's call."""
        return {"causal": self.causal, "key_padding_mask": self.key_padding_mask}

    @property
    def visible(self) -> Int[Tensor, " n"]:
        """Keys that each real query of the first example sees."""
        length = self.q.shape[2] if self.key_padding_mask is None else int(self.key_padding_mask[0].sum())
        return torch.arange(1, length + 1) if self.causal else torch.full((length,), length)


def capture(
    layer: int,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    *,
    causal: bool,
    key_padding_mask: Bool[Tensor, "b n"] | None = None,
) -> Capture:
    """Exact attention, its oracles and the null answer on one layer: computed once, used for every budget and draw."""
    mask = key_padding_mask
    if mask is not None:
        # Padding may hold NaN; from here on it is zero, and every number leaves it out.
        q, k, v = (torch.where(mask[:, None, :, None], x, 0.0) for x in (q, k, v))
    weights = softmax_weights(q.double(), k.double(), causal=causal, key_padding_mask=mask)
    exact = frontier.prepare(weights, v, mask)
    baseline = error.relative_error(error.mean_value(v, causal=causal, key_padding_mask=mask), exact.out, mask)
    return Capture(layer, q, k, v, causal, mask, exact, baseline, error.operator_scale(weights, v, mask))


def read_captures(path: Path) -> list[Capture]:
    """The layers of a `qkv.safetensors`: tensors `layer<i>.q|k|v`, maybe `key_padding_mask`, and metadata `causal`.

    Raises:
        ValueError: the file holds no layer or does not say whether it is causal.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        causal = (file.metadata() or {}).get("causal")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it cannot be iterated)
    layers = sorted(int(name.removeprefix("layer").removesuffix(".q")) for name in tensors if name.endswith(".q"))
    if not layers or causal not in ("true", "false"):
        raise ValueError(
            f"`{path}` is no capture (layers {layers}, causal {causal}): run `dvc repro -f train` on its cell"
        )
    mask = tensors.get("key_padding_mask")
    options = {"causal": causal == "true", "key_padding_mask": None if mask is None else mask.bool()}
    return [capture(i, *(tensors[f"layer{i}.{name}"] for name in "qkv"), **options) for i in layers]
