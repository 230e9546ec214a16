"""Operators inside Hugging Face transformers: `attn_implementation="attnlens:<id>"` for every file of conf/attention.

    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="attnlens:performer")
    build_operators(model, "performer")  # before the optimizer, where operators have weights

transformers projects, rotates and caches; the operator sees q (b, H, n, d) and keys and values that are repeated from
the model's groups to its H heads. A scale other than 1/sqrt(d) is folded into q. The mask interface hands over the 2-D
padding mask (True = real) or None, and causality follows the module's `is_causal`, so that no n x m mask is ever made.
With a key/value cache a query stands at the end of the keys: right for operators that declare `one_query`, refused for
others. Dropout of attention weights is refused, since most operators have none to drop.

Departures from `eager`: a row that sees no key (of padding) is zero, where eager averages all values; attention weights
are not returned.

Reference: "Transformers: state-of-the-art natural language processing", Wolf et al., 2020, and its documentation,
https://huggingface.co/docs/transformers/attention_interface.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, prepare_padding_mask

from attnlens.attention.base import AbstractAttention
from attnlens.attention.build import build, derived_seed
from attnlens.linalg.suffix import repeat_groups
from attnlens.models.build import seeded

PREFIX = "attnlens:"
CONFIGS = Path(__file__).resolve().parents[3] / "conf" / "attention"
# Arguments of some models that change the scores: no operator knows them.
FOREIGN = ("sliding_window", "softcap", "s_aux", "position_bias")


def register(
    configs: Path | str | Mapping[str, Mapping] | None = None, *, max_length: int | None = None, seed: int = 0
) -> list[str]:
    """Make operators known to transformers; returns the names for `attn_implementation`.

    Args:
        configs: a folder of yaml files, or a mapping from ids to what such a file holds; by default conf/attention of
            the checkout that this file is in.
        max_length: for operators that are built for a length; the model's `max_position_embeddings` by default.
        seed: of the operators' draws and first weights; layers differ.

    Raises:
        ValueError: the folder is missing or holds no yaml.
    """
    if configs is None or isinstance(configs, (str, Path)):
        configs = read_configs(Path(CONFIGS if configs is None else configs))
    names = []
    for name, config in configs.items():
        make = partial(_make, name=name, config=config, max_length=max_length, seed=seed)
        AttentionInterface.register(PREFIX + name, partial(attend, name=name, make=make))
        AttentionMaskInterface.register(PREFIX + name, padding_mask)
        names.append(PREFIX + name)
    return names


def read_configs(folder: Path) -> dict[str, dict]:
    """The operators that the yaml files of a folder describe, by name of the file.

    Raises:
        ValueError: no such folder, or no yaml in it.
    """
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise ValueError(
            f"`configs`: no yaml file in `{folder}`; an installed package brings none, so name the folder "
            "conf/attention of a checkout, or pass a mapping from ids to what such a file holds"
        )
    plain = {file.stem: OmegaConf.to_container(OmegaConf.load(file), resolve=True) for file in files}
    return {name: config for name, config in plain.items() if isinstance(config, dict)}


def build_operators(model: nn.Module, name: str) -> list[AbstractAttention]:
    """The operators `name` (an id, without the prefix) of all layers of a model, built now rather than when first used.

    Needed before an optimizer or `load_state_dict` reads the model's parameters, where the operator has weights.

    Raises:
        ValueError: `name` is not registered, or no module of the model asks for attention.
    """
    interface = AttentionInterface().get(PREFIX + name)
    if not isinstance(interface, partial):
        raise ValueError(f"`name` {name!r} is not registered: call `register()` first, with a config of that name")
    modules = [each for each in model.modules() if hasattr(each, "is_causal") and hasattr(each, "config")]
    if not modules:
        raise ValueError(f"`model` {type(model).__name__} has no module that attends through the attention interface")
    make, like = interface.keywords["make"], next(model.parameters())
    return [_operator(module, name, make, like) for module in modules]


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: object,  # transformers passes what its own forms of mask need as well
) -> Tensor | None:
    """The padding mask (b, kv_length), or None where nothing is padded.

    Raises:
        ValueError: a mask that is neither causal nor full (a sliding window, packed sequences), or a static cache.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "`attn_implementation`: an attnlens operator takes a causal or a full mask with padding, and the model "
            "asks for another (a sliding window, chunks, packed sequences); use full-attention layers, and pass an "
            "`attention_mask` of ones where sequences are not packed"
        )
    if mask_function is causal_mask_function and kv_offset + kv_length > int(q_offset) + q_length:
        raise ValueError(
            f"`past_key_values` holds {kv_offset + kv_length} places for {int(q_offset) + q_length} tokens: a static "
            "cache is not supported, use the default dynamic one or `use_cache=False`"
        )
    mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if mask is None:
        return None
    mask = mask[:, kv_offset : kv_offset + kv_length].bool()
    return None if bool(mask.all()) else mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    name: str,
    make: Callable[..., AbstractAttention],
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: object,  # of the model's forward pass; those that would change the scores are refused
) -> tuple[Tensor, None]:
    """Attention of a module of transformers by operator `name`: (b, n, H, dv), and no weights.

    Raises:
        ValueError: dropout, a mask of another form, an argument or a cache that the operator cannot serve.
    """
    _check(name, attention_mask, dropout, others)
    operator = _operator(module, name, make, query)
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        query = query * (scaling * query.shape[-1] ** 0.5)
    key, value = repeat_groups(key, query.shape[1]), repeat_groups(value, query.shape[1])
    causal = _is_causal(module) if is_causal is None else is_causal
    if causal and query.shape[2] < key.shape[2]:
        out = _continue(operator, name, query, key, value, attention_mask)
    else:
        out = operator(query, key, value, causal=causal, key_padding_mask=attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module) -> bool:
    """As transformers itself has it: a decoder may be made bidirectional by its config."""
    return bool(getattr(module, "is_causal", True)) and bool(getattr(module.config, "is_causal", True))


def _continue(
    operator: AbstractAttention, name: str, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
) -> Tensor:
    """The last n rows of a causal run over m > n keys."""
    if not operator.one_query or not operator.causal:
        raise ValueError(
            f"`use_cache`: {PREFIX}{name} cannot continue from cached keys and values, since its rows depend on other "
            "queries or on their place: pass `use_cache=False`, which runs the whole prefix for every token"
        )
    past, rows = k.shape[2] - q.shape[2], []
    for row in range(q.shape[2]):
        seen = past + row + 1
        mask = None if key_padding_mask is None else key_padding_mask[:, :seen]
        rows.append(operator(q[:, :, row : row + 1], k[:, :, :seen], v[:, :, :seen], key_padding_mask=mask))
    return torch.cat(rows, 2)


def _check(name: str, mask: Tensor | None, dropout: float, others: Mapping[str, object]) -> None:
    if dropout > 0:
        raise ValueError(
            f"`dropout` of attention weights is {dropout}, and {PREFIX}{name} has none: set `attention_dropout` (of "
            "BERT and its kin `attention_probs_dropout_prob`) to 0 in the model's config"
        )
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"`attention_mask` must be (batch, length), True or 1 for real tokens, got {tuple(mask.shape)}: "
            f"{PREFIX}{name} takes no mask of queries by keys"
        )
    for foreign in FOREIGN:
        if others.get(foreign) is not None:
            raise ValueError(
                f"`{foreign}` of the model changes the scores, which {PREFIX}{name} cannot do: set it to None"
            )


def _operator(module: nn.Module, name: str, make: Callable[..., AbstractAttention], like: Tensor) -> AbstractAttention:
    """The module's own operator, a submodule of it, built when first asked for."""
    attribute = f"attnlens_{name}"
    if attribute not in module._modules:
        module.add_module(attribute, make(module, like))
    operator = module.get_submodule(attribute)
    assert isinstance(operator, AbstractAttention), "put there above"
    return operator.train(module.training)


def _make(
    module: nn.Module, like: Tensor, *, name: str, config: Mapping, max_length: int | None, seed: int
) -> AbstractAttention:
    model: Any = module.config
    length = max_length or getattr(model, "max_position_embeddings", None)
    if length is None:
        raise ValueError(
            f"`max_length` of {PREFIX}{name}: {type(model).__name__} has no `max_position_embeddings`; "
            "pass `register(max_length=...)`"
        )
    layer = getattr(module, "layer_idx", None) or 0
    head_dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    heads = model.num_attention_heads
    with seeded(derived_seed(seed, layer)):
        operator = build(
            config,
            head_dim=head_dim or model.hidden_size // heads,
            num_heads=heads,
            max_length=length,
            seed=seed,
            layer=layer,
        )
    if operator.arity > 1:
        raise ValueError(
            f"`attn_implementation`: {PREFIX}{name} takes {operator.arity} keys and values for every token, and "
            f"{type(module).__name__} projects one; use it in a model of attnlens"
        )
    # Below float32 the operators keep their own precision, as their inputs are raised to it.
    return operator.to(like.device, torch.float64) if like.dtype == torch.float64 else operator.to(like.device)
