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
from attnlens.models.base import AbstractKit, AbstractModel, Parts
from attnlens.models.block import AbstractBlock
from attnlens.models.heads import VectorHead
from attnlens.position.base import AbstractPosition
from attnlens.projection.base import AbstractProjection, Dims

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
    with seeded(derived_seed(seed, WEIGHTS)):
        built = model_class(config).assemble(ConfigKit(config, meta, seed))
    if meta["causal"] and not built.causal:
        raise ValueError(
            f"`model` is {type(built).__name__}, which sees the tokens after the present one, but the labels of "
            f"{meta['data']} are those tokens: use `model=decoder`"
        )
    return built


def model_class(config: DictConfig) -> type[AbstractModel]:
    """The class that `config.model` names."""
    return get_class(config.model["_target_"])


def build_operator(
    config: DictConfig, meta: Mapping, *, seed: int, layer: int = 0, max_length: int | None = None
) -> AbstractAttention:
    """The attention operator of one layer, for sequences of `max_length` (by default those of the data)."""
    extra = get_class(config.position["_target_"]).extra_dims
    return _operator(config, config.attention, seed, layer, max_length or meta["length"], extra)


def runs_causally(config: DictConfig) -> bool:
    """Whether the operator of `config.attention` is asked to be causal anywhere in the model."""
    return model_class(config).causal and config.model.get("decoder_attention") is None


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


class ConfigKit(AbstractKit):
    """Parts of a model as a config has them.

    Layers are numbered through the model, first those of the encoder, then those of the decoder, then the attentions
    to the memory: the number decides what an operator draws.
    """

    def __init__(self, config: DictConfig, meta: Mapping, seed: int) -> None:
        self.config, self.meta, self.seed = config, meta, seed

    def parts(self) -> Parts:
        model, meta, causal = self.config.model, self.meta, model_class(self.config).causal
        return self._stack(range(model.num_layers), meta["vocabulary_size"], meta["length"], model.head, causal=causal)

    def source_parts(self) -> Parts:
        model, meta = self.config.model, self.meta
        head = {"_target_": f"{VectorHead.__module__}.{VectorHead.__name__}"}
        return self._stack(range(model.num_encoder_layers), meta["vocabulary_size"], meta["length"], head, causal=False)

    def target_parts(self) -> Parts:
        model, meta = self.config.model, self.meta
        layers = range(model.num_encoder_layers, model.num_encoder_layers + model.num_layers)
        return self._stack(layers, meta["num_outputs"], meta["target_length"], model.head, causal=True, cross=True)

    def _stack(
        self,
        layers: range,
        vocabulary_size: int,
        length: int,
        head: Mapping | DictConfig,
        *,
        causal: bool,
        cross: bool = False,
    ) -> Parts:
        config, model = self.config, self.config.model
        offered = {
            "width": model.width,
            "num_heads": model.num_heads,
            "head_dim": _dims(config).rotary_dim,
            "max_length": length,
            "vocabulary_size": vocabulary_size,
            "num_outputs": self.meta["num_outputs"],
            "normalized_shape": model.width,
        }
        embedding = construct(model.embedding, offered)
        position = construct(config.position, offered)
        position.check_causal(causal)
        wanted = model.get("embedding_norm")
        embedding_norm = None if wanted is None else construct(wanted, offered)
        blocks = [self._block(offered, layer, position, cross) for layer in layers]
        norm = nn.Identity() if blocks[-1].normalized else construct(model.norm, offered)
        return Parts(embedding, position, blocks, norm, construct(head, offered), embedding_norm)

    def _block(self, offered: Mapping, layer: int, position: AbstractPosition, cross: bool) -> AbstractBlock:
        model = self.config.model
        own = (model.get("decoder_attention") if cross else None) or self.config.attention
        projection = self._projection(offered, own, layer, position if position.rotates else None)
        memory = None
        if cross:
            last = model.num_encoder_layers + model.num_layers
            memory = self._projection(offered, model.cross_attention or self.config.attention, last + layer, None)
        mlp = None if model.mlp is None else construct(model.mlp, offered)
        count = get_class(model.block["_target_"]).norms_per_part * (1 + cross + (mlp is not None))
        norms = [construct(model.norm, offered) for _ in range(count)]
        return construct(model.block, {"projection": projection, "mlp": mlp, "norms": norms, "cross": memory})

    def _projection(
        self, offered: Mapping, attention: DictConfig, layer: int, position: AbstractPosition | None
    ) -> AbstractProjection:
        extra = 0 if position is None else position.extra_dims
        operator = _operator(self.config, attention, self.seed, layer, offered["max_length"], extra)
        return construct(self.config.projection, {**offered, "attention": operator, "position": position})


def _operator(
    config: DictConfig, attention: DictConfig, seed: int, layer: int, max_length: int, extra: int
) -> AbstractAttention:
    with seeded(derived_seed(seed, layer)):
        return build(
            attention,
            head_dim=_dims(config).head_dim + extra,
            num_heads=config.model.num_heads,
            max_length=max_length,
            seed=seed,
            layer=layer,
        )


def _dims(config: DictConfig) -> Dims:
    options = {name: value for name, value in config.projection.items() if name != "_target_"}
    projection = get_class(config.projection["_target_"])
    return projection.dims(config.model.width, config.model.num_heads, options)
