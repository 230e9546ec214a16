r"""A short training of one layer's projection, operator included, to give what exact attention gave there.

    minimize  sum_b ‖ f(x_b) - y_b ‖^2 / ‖ y_b ‖^2,    y_b = exact projection of the normalized residual x_b,

over the weights of f, started from those of the exact layer. Layers are matched one by one on the exact model's own
residuals, so that no gradient crosses a layer and every layer can be had without the others. What is kept is the best
state seen on the fitting batches, the start included: matching can be of no use, but not of harm there.

Source: the attention transfer of "LoLCATs: On Low-Rank Linearizing of Large Language Models" (Zhang et al., 2024),
https://arxiv.org/abs/2410.10254, here with all weights of the layer's projection.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.projection.base import AbstractProjection


class Example(NamedTuple):
    """Inputs of a projection, which of them are real, and what exact attention made of them; (b, n, w) each."""

    x: Tensor
    mask: Tensor | None
    y: Tensor


class Matched(NamedTuple):
    """The projection and its relative squared error before and after."""

    projection: AbstractProjection
    before: float
    after: float


def match(
    projection: AbstractProjection,
    examples: Sequence[Example],
    *,
    causal: bool,
    steps: int,
    learning_rate: float,
) -> Matched:
    """Train a copy of `projection` for `steps` steps, one example a step in turn; `projection` stays as it was.

    Raises:
        ValueError: no example, or a number of steps below 1.
    """
    if not examples or steps < 1:
        raise ValueError(f"`examples` and `steps` must be at least 1, got {len(examples)} and {steps}")
    trained = copy.deepcopy(projection).train()
    weights = [weight for weight in trained.parameters() if weight.is_floating_point()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    before = best = relative_error(projection, examples, causal=causal)
    kept = copy.deepcopy(trained.state_dict())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        example = examples[step % len(examples)]
        optimizer.zero_grad()
        loss = _loss(trained, example, causal)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % len(examples) == 0 or step + 1 == steps:
            error = relative_error(trained, examples, causal=causal)
            if error < best:
                best, kept = error, copy.deepcopy(trained.state_dict())
    trained.load_state_dict(kept)
    return Matched(trained.eval(), before, best)


def _loss(projection: AbstractProjection, example: Example, causal: bool) -> Float[Tensor, ""]:
    out = projection(example.x, causal=causal, key_padding_mask=example.mask)
    return _real(out - example.y, example.mask).square().sum() / _real(example.y, example.mask).square().sum()


@torch.no_grad()
def relative_error(projection: AbstractProjection, examples: Sequence[Example], *, causal: bool) -> float:
    """Mean over the examples of the relative squared error of a projection's outputs."""
    training = projection.training
    projection.eval()
    error = sum(float(_loss(projection, example, causal)) for example in examples) / len(examples)
    projection.train(training)
    return error


def _real(x: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n w"]:
    return x if mask is None else torch.where(mask[..., None], x, 0)
