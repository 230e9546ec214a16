"""A sequence as a grid: token t of a grid with modes N1 x ... x Nm is its cell number t in row-major order.

The first mode grows with the length and the others are fixed, so that a prefix of a sequence is a prefix of its grid.
Cells behind the last token hold zeros and are masked. A fixed mode longer than the sequence is cut to it, which
changes no result.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def fixed_modes(num_columns: int, num_rows: int | None) -> tuple[int, ...]:
    """(N2,) for a grid of rows, or (N2, N3) for sheets of `num_rows` rows.

    Raises:
        ValueError: a side below 1.
    """
    for name, size in (("num_columns", num_columns), ("num_rows", num_rows)):
        if size is not None and size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}")
    return (num_columns,) if num_rows is None else (num_rows, num_columns)


def grid_shape(length: int, fixed: tuple[int, ...]) -> tuple[int, ...]:
    """N1, ..., Nm for the fixed modes N2, ..., Nm: as many cells as the sequence needs.

    A mode is cut where the tokens fill only one index of all modes before it.
    """
    modes: list[int] = []
    left = length
    for size in reversed(fixed):
        modes.append(min(size, left))
        left = -(-left // modes[-1])
    return (left, *reversed(modes))


def to_grid(x: Float[Tensor, "b h n d"], shape: tuple[int, ...]) -> Float[Tensor, "b h *grid d"]:
    """The tokens in their cells, zeros behind them."""
    missing = math.prod(shape) - x.shape[2]
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, shape)


def to_sequence(x: Float[Tensor, "b h *grid d"], length: int) -> Float[Tensor, "b h n d"]:
    """The first `length` cells as a sequence."""
    return x.flatten(2, -2)[:, :, :length]


def real_cells(
    length: int, shape: tuple[int, ...], key_padding_mask: Bool[Tensor, "b n"] | None, device: torch.device
) -> Bool[Tensor, "#b *grid"] | None:
    """Which cells hold a real token, for each example or for all; None where all do."""
    missing = math.prod(shape) - length
    if key_padding_mask is None:
        if missing == 0:
            return None
        key_padding_mask = torch.ones(1, length, dtype=torch.bool, device=device)
    return F.pad(key_padding_mask, (0, missing), value=False).unflatten(1, shape)


def mode_product(x: Float[Tensor, "b h *grid"], matrix: Float[Tensor, "b h _ _"], mode: int) -> Float[Tensor, "b h *_"]:
    """x x_i M: every fiber along mode i times M."""
    rows = x.movedim(2 + mode, 2)
    return (matrix @ rows.flatten(3)).unflatten(3, rows.shape[3:]).movedim(2, 2 + mode)
