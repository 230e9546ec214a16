"""What a compressed cache costs in accuracy and saves in bytes: decoding on captured queries, keys and values.

The first part of a sequence comes in one call (the prompt), every further token in a call of its own; compared are the
outputs of those further tokens with exact attention in float64, one relative error a head, and the bytes of the state
behind the last token. Skill is the error over that of answering with mean(V). A policy of `budget` entries keeps so
many of the sequence (`snapkv`: of the prompt, and everything after it); the oracle attends to the `budget` keys of the
largest weights, another set for every query, which no cache that drops entries can.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.analysis.capture import read_captures
from attnlens.analysis.error import mean_value, ratio, relative_error
from attnlens.cache.base import AbstractCache
from attnlens.cache.full import Full
from attnlens.cache.heavy_hitters import HeavyHitters
from attnlens.cache.plain import Plain
from attnlens.cache.quantized import Quantized
from attnlens.cache.sliding import Sliding
from attnlens.cache.snapkv import SnapKV
from attnlens.cache.store import AbstractStore
from attnlens.linalg.dense import softmax_weights
from attnlens.linalg.suffix import repeat_groups
from attnlens.models.decoder import Decoder
from attnlens.study import Study, seed_file


class Rung(NamedTuple):
    """One policy of the ladder; `bits` None is full precision, `budget` None drops nothing."""

    policy: str
    budget: int | None
    bits: int | None
    cache: AbstractCache


class Source(NamedTuple):
    """Where queries (b, h, n, d), keys and values (b, g, n, d) come from."""

    labels: Mapping[str, object]
    q: Tensor
    k: Tensor
    v: Tensor


def sliding(budget: int, length: int, bits: int | None) -> Sliding:
    """Four sinks, or a quarter of the budget where that is less."""
    sinks = min(4, budget // 4)
    return Sliding(budget - sinks, sinks, _store(bits, budget // 4))


def heavy_hitters(budget: int, length: int, bits: int | None) -> HeavyHitters:
    """Half for the heavy, half for the recent, as in the paper."""
    return HeavyHitters(budget - budget // 2, budget // 2, _store(bits, budget // 4))


def snapkv(budget: int, length: int, bits: int | None) -> SnapKV:
    """A window of 32, or half of the budget where that is less."""
    return SnapKV(budget, min(32, budget // 2), store=_store(bits, length // 4))


SPLITS: dict[str, Callable[[int, int, int | None], AbstractCache]] = {
    "sliding": sliding,
    "heavy_hitters": heavy_hitters,
    "snapkv": snapkv,
}


def ladder(length: int, fractions: Sequence[float], bits: Sequence[int]) -> Iterator[Rung]:
    """Everything kept, in full and in codes; then every policy at fractions of the length, in full and in codes.

    Groups of codes, and the newest tokens in full, are 32, or less where a policy may drop so new ones.

    Raises:
        ValueError: a fraction of less than two tokens.
    """
    stores = (None, *bits)
    for each in stores:
        yield Rung("full", None, each, Full(_store(each, length // 4)))
    for fraction in fractions:
        budget = int(fraction * length)
        if budget < 2:
            raise ValueError(f"`fractions` {fraction} of {length} tokens is less than two entries: raise it")
        for policy, split in SPLITS.items():
            for each in stores:
                yield Rung(policy, budget, each, split(budget, length, each))


def _store(bits: int | None, group: int) -> AbstractStore:
    group = max(1, min(32, group))
    return Plain() if bits is None else Quantized(bits, group, group)


def decoded(
    cache: AbstractCache,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n dv"],
    *,
    prompt: int,
) -> tuple[Float[Tensor, "b h rest dv"], int]:
    """Outputs of the tokens behind the first `prompt`, one call each, and the bytes of the last state."""
    state = cache.init(q.shape[0], k.shape[1], k.shape[3], v.shape[3], capacity=q.shape[2], like=k)
    state, _ = cache.step(state, *(x[:, :, :prompt] for x in (q, k, v)))
    outputs = []
    for at in range(prompt, q.shape[2]):
        state, out = cache.step(state, *(x[:, :, at : at + 1] for x in (q, k, v)))
        outputs.append(out)
    return torch.cat(outputs, 2), cache.num_bytes(state)


def decoded_loss(model: Decoder, ids: Int[Tensor, "b n"], cache: AbstractCache, *, prompt: int) -> float:
    """Mean negative log-likelihood, in nats, of the tokens behind the first `prompt`, each fed as it is in `ids`."""
    state = model.init_cache(ids.shape[0], ids.shape[1], cache=cache)
    state, logits = model.step(state, ids[:, :prompt])
    losses = []
    for at in range(prompt, ids.shape[1]):
        losses.append(torch.nn.functional.cross_entropy(logits[:, -1].float(), ids[:, at]))
        state, logits = model.step(state, ids[:, at : at + 1])
    return torch.stack(losses).mean().item()


def compare(source: Source, settings: Mapping[str, Any], progress: Callable[[str], None]) -> list[dict[str, object]]:
    """A row for every rung and one for the oracle at every budget, errors and skills one a head."""
    q, k, v = source.q, source.k, source.v
    n, heads = q.shape[2], q.shape[1]
    prompt = int(settings["prompt"] * n)
    values = repeat_groups(v.double(), heads)
    weights = softmax_weights(q.double(), repeat_groups(k.double(), heads), causal=True)[:, :, prompt:]
    exact = weights @ values
    null = relative_error(mean_value(values, causal=True)[:, :, prompt:], exact)

    def row(policy: str, budget: int | None, bits: int | None, out: Tensor, num_bytes: int) -> dict[str, object]:
        errors = relative_error(out, exact)
        skill = [ratio(error, none) for error, none in zip(errors, null, strict=True)]
        named = {"policy": policy, "budget": budget, "bits": bits, "bytes": num_bytes, "tokens": n, "prompt": prompt}
        return {**source.labels, **named, "error": errors, "skill": skill, "null": null}

    rows = []
    progress("cache: " + ", ".join(f"{name} {value}" for name, value in source.labels.items()))
    for rung in ladder(n, settings["fractions"], settings["bits"]):
        with torch.no_grad():
            rows.append(row(rung.policy, rung.budget, rung.bits, *decoded(rung.cache, q, k, v, prompt=prompt)))
    entry = rows[0]["bytes"] // n
    for budget in sorted({rung["budget"] for rung in rows if rung["budget"] is not None}):
        top = weights.topk(budget, -1)
        kept = torch.zeros_like(weights).scatter(-1, top.indices, top.values)
        rows.append(row("oracle", budget, None, kept / kept.sum(-1, keepdim=True) @ values, budget * entry))
    return rows


def reference_sources(study: Study, root: Path) -> Iterator[Source]:
    """The causal layers of the study's reference models.

    Raises:
        ValueError: a reference model that the study lists has not been trained.
    """
    for data in study.data:
        for seed in range(study.seeds):
            for capture in read_captures(seed_file(root, study.reference, data, seed, "qkv.safetensors")):
                if capture.causal and capture.key_padding_mask is None:
                    yield Source({"source": data, "seed": seed, "layer": capture.layer}, *capture.inputs)


def cache(
    study: Study, root: Path, settings: Mapping[str, Any], progress: Callable[[str], None] = print
) -> dict[str, Any]:
    """results/cache.json: every policy on the causal reference models of the study, and on a stored capture if named.

    Raises:
        ValueError: a reference model has not been trained, or the named capture is missing.
    """
    sources = list(reference_sources(study, root))
    if settings["capture"] is not None:
        sources.append(read_source(root / settings["capture"]))
    rows = [row for source in sources for row in compare(source, settings, progress)]
    reason = None if rows else "no reference model is causal and without padding, and `capture` is null"
    return {"settings": dict(settings), "rows": rows, "reason": reason}


def read_source(path: Path) -> Source:
    """What `benchmarks/real.py` stored: heads whose keys are repeated for their group; whole groups of three.

    Raises:
        ValueError: there is no such file.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"`capture` {path.name} is missing: run `python benchmarks/real.py`, or leave `capture` null")
    stored = load_file(path)
    q, k, v = (stored[name] for name in "qkv")
    return Source({"source": path.stem, "seed": None, "layer": None}, q[:, :6], k[:, :6:3], v[:, :6:3])


def summarize(result: Mapping[str, Any]) -> dict[str, float]:
    """The mean skill over heads, layers and seeds of every source and rung."""
    found: dict[str, list[float]] = {}
    for row in result["rows"]:
        name = f"{row['source']}/{row['policy']}/{row['budget']}/{row['bits'] or 'full'}"
        found.setdefault(name, []).extend(row["skill"])
    return {name: sum(values) / len(values) for name, values in found.items()}
