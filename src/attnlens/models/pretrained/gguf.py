"""A GGUF file: metadata as plain values, tensors in float32.

Reading and dequantizing are the `gguf` package's. Rows of query and key weights are in the order of llama.cpp, which
pairs neighboring coordinates for rotation: `halves` puts them back to the order that pairs j with j + d/2.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class Gguf:
    """An open file.

    Raises:
        ValueError: it is no GGUF file, or cut short.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        remedy = "it is damaged or cut short: delete it and fetch it again, `python pipelines/fetch.py source=...`"
        try:
            self.reader = GGUFReader(path)
            # Slices of a memory map are lazy: the last byte of every tensor must be there.
            short = [t.name for t in self.reader.tensors if t.data_offset + t.n_bytes > path.stat().st_size]
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"`{path}` cannot be read as GGUF ({error}); {remedy}") from error
        if short:
            raise ValueError(f"`{path}` ends before its tensors {short[:3]}; {remedy}")
        self.path = path

    def value(self, key: str) -> Any:
        """The metadata under `key`.

        Raises:
            ValueError: there is none.
        """
        field = self.reader.fields.get(key)
        if field is None:
            raise ValueError(f"`{self.path}` has no metadata {key!r}: it is the file of another architecture")
        return field.contents()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and values of each tensor, dequantized one at a time."""
        from gguf import dequantize

        for tensor in self.reader.tensors:
            yield tensor.name, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def halves(weight: Float[Tensor, "o i"], num_heads: int) -> Float[Tensor, "o i"]:
    """Rows 2j and 2j + 1 of every head at j and j + d/2."""
    rows = weight.unflatten(0, (num_heads, -1, 2))
    return rows.transpose(1, 2).flatten(0, 2)
