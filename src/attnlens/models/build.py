"""From a composed config and the facts of a data set to a model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import Tensor, nn

from attnlens.attention.base import AbstractAttention
from attnlens.attention.build import build, derived_seed
from attnlens.construct import construct
from attnlens.models.base import AbstractModel
from attnlens.models.block import AbstractBlock
from attnlens.position.base import AbstractPosition

# Streams of random numbers that never meet: operators have layer numbers >= 0 as their second entropy word.
WEIGHTS = 2**32 - 1


def build_model(config: DictConfig, meta: Mapping, *, seed: int) -> AbstractModel:
    """The model of `config.{model,attention,projection,position}` for the data that `meta` describes.

    All weights but the operators' own are drawn from a stream of their own, derived from `seed`: two models that
    differ in their operator start from equal weights.

    Raises:
        ValueError: an unknown keyword in a config, a width that does not divide into heads, or a bidirectional
            model on data whose labels lie in the future.
    """
    model = config.model
    if model.width % model.num_heads:
        raise ValueError(f"`model.width` must be a multiple of `model.num_heads`, got {model.width}, {model.num_heads}")
    operators = [build_operator(config, meta, seed=seed, layer=layer) for layer in range(model.num_layers)]
    with seeded(derived_seed(seed, WEIGHTS)):
        built = _assemble(config, meta, operators)
    if meta["causal"] and not built.causal:
        raise ValueError(
            f"`model` is {type(built).__name__}, which sees the tokens after the present one, but the labels of "
            f"{meta['data']} are those tokens: use `model=decoder`"
        )
    return built


def model_class(config: DictConfig) -> type[AbstractModel]:
    """The class that `config.model` names."""
    return get_class(config.model["_target_"])


def build_operator(config: DictConfig, meta: Mapping, *, seed: int, layer: int = 0) -> AbstractAttention:
    """The attention operator of one layer."""
    with seeded(derived_seed(seed, layer)):
        return build(
            config.attention,
            head_dim=config.model.width // config.model.num_heads,
            num_heads=config.model.num_heads,
            max_length=meta["length"],
            seed=seed,
            layer=layer,
        )


def refusal(operator: AbstractAttention, *, causal: bool) -> str | None:
    """Why the operator cannot run on such data, in its own words, or None if it can."""
    if operator.causal or not causal:
        return None
    q: Tensor = torch.zeros(1, 1, 1, 1)
    try:
        operator(q, q, q, causal=True)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{type(operator).__name__} declares `causal = False` and yet ran causally")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a generator of this seed inside, and leave the global one as it was.

    Layers of PyTorch initialize themselves from the global generator; this is how to give them one of their own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _assemble(config: DictConfig, meta: Mapping, operators: list[AbstractAttention]) -> AbstractModel:
    model = config.model
    offered = {
        "width": model.width,
        "num_heads": model.num_heads,
        "head_dim": model.width // model.num_heads,
        "max_length": meta["length"],
        "vocabulary_size": meta["vocabulary_size"],
        "num_outputs": meta["num_outputs"],
        "normalized_shape": model.width,
    }
    embedding = construct(model.embedding, offered)
    position = construct(config.position, offered)
    blocks = [_block(config, offered, operator, position) for operator in operators]
    norm = nn.Identity() if blocks[-1].normalized else construct(model.norm, offered)
    head = construct(model.head, offered)
    parts = {"embedding": embedding, "position": position, "blocks": blocks, "norm": norm, "head": head}
    return construct({"_target_": model["_target_"]}, parts)


def _block(
    config: DictConfig, offered: Mapping, operator: AbstractAttention, position: AbstractPosition
) -> AbstractBlock:
    model = config.model
    rotation = position if position.rotates else None
    projection = construct(config.projection, {**offered, "attention": operator, "position": rotation})
    mlp = None if model.mlp is None else construct(model.mlp, offered)
    norms = [construct(model.norm, offered) for _ in range(1 if mlp is None else 2)]
    return construct(model.block, {"projection": projection, "mlp": mlp, "norms": norms})
