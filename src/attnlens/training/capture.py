"""The queries, keys and values that the attention operators of a model receive on given inputs."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from attnlens.models.base import AbstractModel, AbstractStack
from attnlens.models.seq2seq import Seq2Seq


def stack(model: AbstractModel) -> AbstractStack:
    """The stack that reads the inputs: the model, or the encoder of a pair.

    Raises:
        ValueError: a model of another kind.
    """
    found = model.encoder if isinstance(model, Seq2Seq) else model
    if not isinstance(found, AbstractStack):
        raise ValueError(f"`model` is {type(model).__name__}, of which it is not known what reads the inputs")
    return found


def capture(model: AbstractStack, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`layer<i>.q`, `.k`, `.v` of shape (batch, heads, length, head_dim), and the `key_padding_mask` if there is one.

    They are read at the door of each operator, so they are exactly what it receives, positions and convolutions
    included.
    """
    tensors: dict[str, Tensor] = {}
    handles = []
    for layer, operator in enumerate(model.operators):

        def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...], layer: int = layer) -> None:
            for name, tensor in zip("qkv", inputs, strict=True):
                tensors[f"layer{layer}.{name}"] = tensor.detach().float().cpu().contiguous()

        handles.append(operator.register_forward_pre_hook(keep))
    mask = batch.get("attention_mask")
    try:
        with torch.no_grad():
            model(batch["input_ids"], key_padding_mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    return tensors if mask is None else {**tensors, "key_padding_mask": mask.cpu()}


def save_capture(path: Path, model: AbstractModel, batch: Mapping[str, Tensor]) -> None:
    """Write `capture` of `stack(model)` as safetensors, with whether its attention is causal in the metadata."""
    reader = stack(model)
    save_file(capture(reader, batch), path, metadata={"causal": str(reader.causal).lower()})
