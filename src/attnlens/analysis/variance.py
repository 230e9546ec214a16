"""How uncertain random features of the softmax kernel are: relative variances of one draw, from their formulas.

The formulas are those of `linalg.random_features` and `linalg.exponential_features`, exact for independent draws; with
m draws the relative standard deviation of an estimate is (variance / m)^{1/2}, so that about `variance` draws are
needed before a weight is known to within itself. Logarithms of base 10, since the numbers leave the range of floats.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlens.analysis.capture import read_captures
from attnlens.linalg.exponential_features import log_second_moment, optimal_coefficients, pair_moment
from attnlens.linalg.random_features import (
    hyperbolic_log_variance,
    positive_log_variance,
    trigonometric_log_variance,
)
from attnlens.study import Study, seed_file

# Tokens of a side whose pairs are looked at.
TOKENS = 128


class Pairs(NamedTuple):
    """x + y, x - y of all pairs of one head, (tokens, tokens, head_dim), and the mean of (x + y)(x + y)^T."""

    total: Tensor
    difference: Tensor
    moment: Tensor


def positive(pairs: Pairs) -> Tensor:
    return positive_log_variance(pairs.total.square().sum(-1))


def hyperbolic(pairs: Pairs) -> Tensor:
    return hyperbolic_log_variance(pairs.total.square().sum(-1))


def trigonometric(pairs: Pairs) -> Tensor:
    return trigonometric_log_variance(pairs.difference.square().sum(-1))


def fitted(pairs: Pairs) -> Tensor:
    """FAVOR#, fitted to these very pairs."""
    energy, directions = torch.linalg.eigh(pairs.moment)
    moment = log_second_moment(pairs.total @ directions, optimal_coefficients(energy.clamp_min(0)))
    # log(e^t - 1), finite where the second moment is large.
    return moment + torch.log(-torch.expm1(-moment))


FEATURES: dict[str, Callable[[Pairs], Tensor]] = {
    "positive": positive,
    "hyperbolic": hyperbolic,
    "trigonometric": trigonometric,
    "favor_sharp": fitted,
}


def variances(q: Tensor, k: Tensor) -> list[dict[str, float]]:
    """Median over pairs of the base-10 logarithm of the relative variance of every kind, and the mean over pairs of the
    logarithm that FAVOR# minimizes; one record a head of (heads, tokens, head_dim) queries and keys."""
    records = []
    scale = q.shape[-1] ** -0.25
    for x, y in zip(q.double()[:, :TOKENS] * scale, k.double()[:, :TOKENS] * scale, strict=True):
        moment = pair_moment(x[None, None], y[None, None], None)[0]
        pairs = Pairs(x[:, None] + y, x[:, None] - y, moment)
        record = {name: (log(pairs).median() / math.log(10)).item() for name, log in FEATURES.items()}
        records.append(record | {"logit_scale": (x @ y.mT).std().item()})
    return records


def variance(study: Study, root: Any, settings: Mapping, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """results/variance.json: Gaussian queries and keys at a ladder of logit scales, and those of the reference models.

    Raises:
        ValueError: a reference model that the study lists has not been trained.
    """
    progress("variance: gaussian")
    scales = [float(scale) for scale in settings["logit_scales"]]
    gaussian = [_gaussian(scale, settings) for scale in scales]
    reference = []
    for data in study.data:
        for seed in range(study.seeds):
            progress(f"variance: {data}, seed {seed}")
            for capture in read_captures(seed_file(root, study.reference, data, seed, "qkv.safetensors")):
                where = {"data": data, "seed": seed, "layer": capture.layer, "head_dim": capture.q.shape[-1]}
                heads = variances(capture.q[0], capture.k[0])
                reference += [where | {"head": head} | record for head, record in enumerate(heads)]
    return {"head_dim": settings["head_dim"], "gaussian": gaussian, "reference": reference}


def _gaussian(scale: float, settings: Mapping) -> dict[str, float]:
    generator = torch.Generator().manual_seed(settings["seed"])
    shape = 2, 1, TOKENS, settings["head_dim"]
    q, k = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale**0.5
    return variances(q, k)[0] | {"logit_scale": scale}


def summarize(result: Mapping[str, Any]) -> dict[str, float]:
    """The logarithms at every logit scale of the Gaussian ladder."""
    rows: Sequence[Mapping[str, float]] = result["gaussian"]
    return {f"{name}/{row['logit_scale']:g}": row[name] for row in rows for name in FEATURES}
