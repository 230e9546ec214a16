"""A trained model back from the folder that its seed left."""

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_model

from attnlens.data.store import load_meta
from attnlens.models.base import AbstractModel
from attnlens.models.build import build_model
from attnlens.models.decoder import Decoder


def load_trained(folder: Path, meta: Mapping) -> AbstractModel:
    """The model of `folder` (models/<attention>/<data>/seed<s>), in evaluation mode; `meta` is that of its data.

    Raises:
        ValueError: the folder holds no model; the message names the command that trains one.
    """
    for name in ("model.safetensors", "config.yaml"):
        if not (folder / name).is_file():
            raise ValueError(f"`{folder / name}` is missing: train the cell, `dvc repro train` or pipelines/train.py")
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig), "training writes a mapping"
    model = build_model(config, meta, seed=config.seed)
    load_model(model, str(folder / "model.safetensors"))
    return model.eval()


def load_decoder(folder: Path, data: Path, *, max_length: int) -> tuple[Decoder, int]:
    """A decoder for sequences of up to `max_length` tokens, and the length that it was trained on.

    Raises:
        ValueError: not a decoder, or one whose positions or operators have weights for the trained length only.
    """
    meta = load_meta(data)
    trained = meta["length"]
    try:
        model = load_trained(folder, {**meta, "length": max(trained, max_length)})
    except RuntimeError as error:
        raise ValueError(
            f"`max_length` {max_length} exceeds the {trained} tokens that `{folder}` was trained on, and its weights "
            f"are for that length: ask for fewer tokens ({error})"
        ) from error
    if not isinstance(model, Decoder):
        raise ValueError(f"`{folder}` holds a {type(model).__name__}: name a cell whose model is a decoder")
    return model, trained
