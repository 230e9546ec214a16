"""A trained model as a folder that needs nothing else: no data, no conf/, no study.

    model.safetensors    the weights, and the buffers that are drawn
    config.json          attention, projection, position, model, seed; the facts of the data that shape the model; the
                         version that wrote it; SHA-256 of the other files
    tokenizer.json       of the data, where it has one

`load_exported` gives the logits of the exported model to the bit. What a config may build is limited to classes of
attnlens and torch.nn, since a folder from elsewhere is not to run anything else.

Reference for the weights: safetensors, https://github.com/huggingface/safetensors.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model

import attnlens
from attnlens.data.integrity import sha256, verify
from attnlens.data.store import load_meta
from attnlens.files import atomic, read_json, write_json
from attnlens.models.base import AbstractModel
from attnlens.models.build import build_model
from attnlens.training.load import load_trained

FORMAT = 1
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
SECTIONS = ("attention", "projection", "position", "model")
# What a model, or whoever reads its logits, must know of the data; paths and hashes stay behind.
FACTS = (
    "data",
    "task",
    "objective",
    "causal",
    "vocabulary_size",
    "num_outputs",
    "length",
    "target_length",
    "metric",
    "characters_per_token",
)
TRUSTED = ("attnlens.", "torch.nn.")
REMEDY = "export the cell again, `python pipelines/export.py`, or copy the whole folder again"


def export(cell: Path | str, prepared: Path | str, out: Path | str) -> dict[str, Any]:
    """Write the folder `out` from one seed of a cell (models/<attention>/<data>/seed<s>) and its prepared data.

    Returns:
        What was written to `config.json`.

    Raises:
        ValueError: no trained model, no prepared data, or `out` is there and is no export.
    """
    cell, prepared, out = Path(cell), Path(prepared), Path(out)
    if out.exists() and not (out / CONFIG).is_file():
        raise ValueError(f"`out`: `{out}` exists and is no export, and would be replaced: name another folder")
    meta = load_meta(prepared)
    model = load_trained(cell, meta)
    trained = OmegaConf.to_container(OmegaConf.load(cell / "config.yaml"), resolve=True)
    assert isinstance(trained, dict), "training writes a mapping"
    with atomic(out) as aside:
        aside.mkdir()
        save_model(model, str(aside / WEIGHTS))
        if (prepared / TOKENIZER).is_file():
            shutil.copyfile(prepared / TOKENIZER, aside / TOKENIZER)
        config = {
            "format": FORMAT,
            "attnlens": attnlens.__version__,
            "seed": trained["seed"],
            **{section: trained[section] for section in SECTIONS},
            "meta": {name: meta[name] for name in FACTS if name in meta},
            "files": {path.name: sha256(path) for path in sorted(aside.iterdir())},
        }
        write_json(aside / CONFIG, config)
    return config


def load_exported(
    folder: Path | str, *, max_length: int | None = None, trusted: tuple[str, ...] = TRUSTED
) -> AbstractModel:
    """The model of an exported folder, in evaluation mode.

    Args:
        folder: what `export` wrote.
        max_length: build it for longer sequences than it was trained on, where no weight depends on the length.
        trusted: beginnings of the names of classes that the config may build; add that of a package with an operator
            of your own.

    Raises:
        ValueError: a file that is missing or damaged, another format, a class that is not trusted or not there, and
            tensors that are missing, left over or of another shape.
    """
    folder = Path(folder)
    config = _read(folder, trusted)
    meta = config["meta"]
    meta = {**meta, "length": max(meta["length"], max_length or 0)}
    try:
        model = build_model(OmegaConf.create({name: config[name] for name in SECTIONS}), meta, seed=config["seed"])
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`{folder / CONFIG}` names a class that this attnlens {attnlens.__version__} does not have ({error}): it "
            f"was written by version {config.get('attnlens')}, install that one"
        ) from error
    _fill(model, folder / WEIGHTS, max_length)
    verify(folder, config["files"], REMEDY)
    return model.eval()


def _read(folder: Path, trusted: tuple[str, ...]) -> dict[str, Any]:
    """The config of an exported folder, seen to be whole."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"`{folder / name}` is missing: {REMEDY}")
    try:
        config = read_json(folder / CONFIG)
    except ValueError as error:
        raise ValueError(f"`{folder / CONFIG}` is damaged ({error.__cause__}): {REMEDY}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise ValueError(
            f"`{folder / CONFIG}` has format {found!r}, and attnlens {attnlens.__version__} reads {FORMAT}: "
            "install the version that wrote it, or export the cell again with this one"
        )
    absent = [name for name in (*SECTIONS, "seed", "meta", "files") if name not in config]
    if absent:
        raise ValueError(f"`{folder / CONFIG}` lacks {absent}: {REMEDY}")
    foreign = sorted({name for name in _targets(config) if not name.startswith(trusted)})
    if foreign:
        raise ValueError(
            f"`{folder / CONFIG}` wants to build {foreign}: pass `trusted` with the beginnings of these names, if you "
            "know where the folder comes from"
        )
    return config


def _targets(config: object) -> Iterator[str]:
    """All values of `_target_` in a config."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield str(config["_target_"])
        for value in config.values():
            yield from _targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from _targets(value)


def _fill(model: AbstractModel, path: Path, max_length: int | None) -> None:
    """The tensors of a file into the model, each in its place."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{path}` is damaged ({error}): {REMEDY}") from error
    common = sorted(own.keys() & shapes.keys())
    wrong = [f"{name} {shapes[name]}, not {own[name]}" for name in common if shapes[name] != own[name]]
    if wrong:
        longer = "" if max_length is None else f", or leave out `max_length` {max_length}, which these weights exclude"
        raise ValueError(f"`{path}` holds tensors of another shape: {wrong[:5]}; {REMEDY}{longer}")
    # Tensors that a model shares are stored once, which `load_model` knows.
    missing, extra = load_model(model, str(path), strict=False)
    if missing or extra:
        raise ValueError(
            f"`{path}` is not a file of this model: missing {sorted(missing)[:5]}, left over {sorted(extra)[:5]}; "
            f"{REMEDY}"
        )
