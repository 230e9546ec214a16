"""What a pretrained model loses by each conversion, at a ladder of settings: one row a setting.

SmolLM2 is scored by its perplexity on the beginning of a play, MiniLM by the mean cosine between the embeddings of
sentences before and after, the study's own character model by its perplexity on test windows. Conversions that need
activations see another play.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlens.conversion.base import Converted
from attnlens.conversion.collaborative import collaborative
from attnlens.conversion.extreme import extreme, separate, shared_bases, shared_cores
from attnlens.conversion.joint_svd import joint_svd
from attnlens.conversion.mean_pooling import mean_pooling
from attnlens.conversion.transmla import transmla
from attnlens.conversion.trawl import trawl
from attnlens.data.store import load_meta, load_split
from attnlens.models.base import AbstractStack
from attnlens.models.pretrained.minilm import embed, load_minilm
from attnlens.models.pretrained.smollm2 import load_smollm2
from attnlens.substitution.texts import read_work
from attnlens.training.load import load_trained

Score = Callable[[AbstractStack], float]


class Setting(NamedTuple):
    """One point of a curve: the conversion, what it was asked for, and whether it promises to change nothing."""

    conversion: str
    setting: str
    run: Callable[[], Converted]
    exact: bool


class Subject(NamedTuple):
    """A model, how it is scored, and its settings."""

    model: AbstractStack
    metric: str
    score: Score
    settings: Sequence[Setting]


def convert(
    name: str, root: Path, options: Mapping[str, Any], progress: Callable[[str], None] = print
) -> dict[str, Any]:
    """All rows of one model, as results/convert/<name>.json holds them.

    Raises:
        ValueError: an unknown model, or one that has not been fetched.
    """
    subjects = {"smollm2": smollm2, "minilm": minilm, "shakespeare": shakespeare}
    if name not in subjects:
        raise ValueError(f"`pretrained` is {name!r}: choose one of {sorted(subjects)}")
    subject = subjects[name](root, options)
    rows = list(_rows(subject, progress))
    return {"model": name, "metric": subject.metric, "value": subject.score(subject.model), "rows": rows}


def _rows(subject: Subject, progress: Callable[[str], None]) -> Iterator[dict[str, object]]:
    for setting in subject.settings:
        converted = setting.run()
        value = subject.score(converted.model)
        progress(f"convert: {setting.conversion} {setting.setting}, {subject.metric} {value:.4g}")
        row = {"conversion": setting.conversion, "setting": setting.setting, "exact": setting.exact, "value": value}
        yield row | {"parameters": converted.parameters, "cache": converted.cache}


def smollm2(root: Path, options: Mapping[str, Any]) -> Subject:
    """SmolLM2 by perplexity; conversions that move rotations or keep them."""
    loaded = load_smollm2(root / "data/raw/smollm2")
    score, seen = (
        _ids(loaded.tokenizer.encode(read_work(root, options["text"], options[work])).ids, options["length"])
        for work in ("test", "fit")
    )
    model = loaded.model
    settings = [Setting("mean_pooling", f"G = {g}", partial(mean_pooling, model, g), g == 3) for g in (3, 1)]
    for fold in options["folds"]:
        settings += [
            Setting("transmla", f"r = {r}, fold {fold}", partial(transmla, model, seen, r, fold=fold), False)
            for r in (options["ranks"] if fold == options["folds"][0] else options["ranks"][:1])
        ]
    for r in (384, *options["ranks"]):
        settings.append(Setting("joint_svd", f"r = {r}", partial(joint_svd, model, r, seen), r == 384))
        if r <= 256:
            settings.append(Setting("joint_svd, weights", f"r = {r}", partial(joint_svd, model, r), False))
    settings += [
        Setting("extreme 1", f"r = {r}", partial(extreme, model, partial(separate, rank=r)), r == 192)
        for r in (192, 144, 96)
    ]
    return Subject(model, "perplexity", partial(_perplexity, ids=score), settings)


def shakespeare(root: Path, options: Mapping[str, Any]) -> Subject:
    """The study's reference model of characters, which is small and trained here; the conversions of SmolLM2."""
    data = root / "data/prepared/shakespeare"
    model = load_trained(root / "models/softmax/shakespeare/seed0", load_meta(data))
    if not isinstance(model, AbstractStack):
        raise ValueError("`models/softmax/shakespeare` has two stacks: train it with `model=decoder`")
    score, seen = (
        torch.from_numpy(load_split(data, split)["input_ids"][: options["windows"]]).long()
        for split in ("test", "validation")
    )
    settings = [Setting("mean_pooling", f"G = {g}", partial(mean_pooling, model, g), g == 2) for g in (2, 1)]
    settings += [
        Setting("transmla", f"r = {r}, fold 1", partial(transmla, model, seen, r), False) for r in (64, 48, 32, 16)
    ]
    settings += [
        Setting("joint_svd", f"r = {r}", partial(joint_svd, model, r, seen), r == 64) for r in (64, 48, 32, 16)
    ]
    settings += [
        Setting("extreme 1", f"r = {r}", partial(extreme, model, partial(separate, rank=r)), r == 64)
        for r in (64, 48, 32)
    ]
    settings += [
        Setting("extreme 2", f"r = {r}", partial(extreme, model, partial(shared_bases, rank=r)), r == 64)
        for r in (64, 56, 48)
    ]
    settings += [
        Setting("trawl tucker", f"{ranks}", partial(trawl, model, rank=ranks, kind="tucker", order=order), False)
        for order, ranks in ((3, (20, 60, 60)), (4, (2, 10, 60, 60)), (5, (2, 10, 2, 32, 56)))
    ]
    return Subject(model, "perplexity", partial(_perplexity, ids=score), settings)


def minilm(root: Path, options: Mapping[str, Any]) -> Subject:
    """MiniLM by the cosine to its own embeddings; conversions that need no rotation, and equal square slices."""
    loaded = load_minilm(root / "data/raw/minilm")
    work = read_work(root, options["text"], options["test"])
    lines = [line.strip() for line in work.splitlines() if len(line.strip()) > 30]
    sentences = lines[:: max(1, len(lines) // options["sentences"])][: options["sentences"]]
    before, model = embed(loaded, sentences), loaded.model

    def cosine(converted: AbstractStack) -> float:
        return float((embed(loaded._replace(model=converted), sentences) * before).sum(-1).mean())

    settings = [Setting("mean_pooling", f"G = {g}", partial(mean_pooling, model, g), g == 12) for g in (12, 6, 4, 1)]
    settings += [
        Setting("joint_svd, weights", f"r = {r}", partial(joint_svd, model, r), r == 384) for r in (384, 256, 192, 128)
    ]
    settings += [
        Setting("collaborative", f"R = {r}", partial(collaborative, model, r, iterations=10), r == 384)
        for r in (384, 256, 192, 128)
    ]
    settings += [
        Setting("extreme 1", f"r = {r}", partial(extreme, model, partial(separate, rank=r)), r == 384)
        for r in (384, 256, 192, 128)
    ]
    settings += [
        Setting("extreme 2", f"r = {r}", partial(extreme, model, partial(shared_bases, rank=r)), r == 384)
        for r in (384, 320, 256)
    ]
    settings += [
        Setting(
            "extreme 3", f"r = {r}, {c} cores", partial(extreme, model, partial(shared_cores, rank=r, cores=c)), False
        )
        for r, c in ((384, 64), (320, 48))
    ]
    settings += [
        Setting("trawl cp", f"R = {r}, a layer", partial(trawl, model, rank=r, layerwise=True), False)
        for r in (64, 256)
    ]
    settings += [
        Setting("trawl tucker", f"{ranks}", partial(trawl, model, rank=ranks, kind="tucker", order=order), False)
        for order, ranks in ((3, (64, 352, 352)), (4, (6, 11, 352, 352)), (5, (6, 11, 12, 30, 352)))
    ]
    return Subject(model, "cosine", cosine, settings)


@torch.no_grad()
def _perplexity(model: AbstractStack, ids: Tensor) -> float:
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    # Means beyond this are no better known than that they are hopeless, and JSON holds no infinity.
    return math.exp(min(float(loss), 700.0))


def _ids(ids: Sequence[int], length: int) -> Tensor:
    return torch.tensor([list(ids[:length])])
