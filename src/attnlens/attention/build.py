"""The one way to build an operator from its config."""

from collections.abc import Mapping

import numpy as np
from omegaconf import DictConfig

from attnlens.attention.base import AbstractAttention
from attnlens.construct import PerPath, construct


def derived_seed(seed: int, layer: int, path: tuple[str, ...] = ()) -> int:
    """A seed for the operator of one layer (and one nested part of it): layers differ, runs repeat."""
    entropy = [seed, layer, *(byte for name in path for byte in name.encode())]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def build(
    config: Mapping | DictConfig,
    *,
    head_dim: int,
    num_heads: int,
    max_length: int,
    seed: int = 0,
    layer: int = 0,
    **overrides: object,
) -> AbstractAttention:
    """Build the operator that `config` (a file of conf/attention/) describes.

    The three dimensions, and a seed derived from the study's seed and the layer, go to the constructors that name
    them, nested operators included. Further keywords override the config, e.g. `num_features=256`.

    Raises:
        ValueError: an unknown keyword, or a dimension, a seed or `_partial_` written in the config.
    """
    offered = {
        "head_dim": head_dim,
        "num_heads": num_heads,
        "max_length": max_length,
        "seed": PerPath(lambda path: derived_seed(seed, layer, path)),
    }
    operator = construct(config, offered, **overrides)
    if not isinstance(operator, AbstractAttention):
        raise ValueError(f"`_target_` must name an AbstractAttention, got {type(operator).__name__}")
    return operator
