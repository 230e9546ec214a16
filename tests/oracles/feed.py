"""What the oracle tests share: optional packages, "feed these q, k, v", and the tolerances.

The packages are no dependency of attnlens: without one its tests skip and say so. They are imported inside the tests,
so that collecting the others does not pay for it.
"""

import importlib
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from attnlens.testing.inputs import EXACT, HEADS, assert_close, gaussian

# An oracle that runs in float64 throughout agrees to `EXACT`. One that casts its softmax to float32 whatever it is
# given runs in float32, where its mask values fit: round-off at these small sizes is far below the contract's `SINGLE`.
ROUNDED = 1e-5

__all__ = ["EXACT", "HEADS", "ROUNDED", "assert_agree", "feed", "leaves", "optional", "real_tokens", "split_heads"]


def optional(module: str) -> ModuleType:
    """The module, or a skip where its package is not installed; a package without the module is a failure."""
    package = module.partition(".")[0]
    reason = f"the independent oracle needs the optional package {package.replace('_', '-')}"
    with warnings.catch_warnings():
        # Releases of 2022 import distutils and others that Python has deprecated since.
        warnings.simplefilter("ignore", DeprecationWarning)
        pytest.importorskip(package, reason=reason)
        return importlib.import_module(module)


class Lookup(nn.Module):
    """In place of a projection: token number t, which every entry of its hidden state holds, becomes row t."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.rows = x.transpose(1, 2).flatten(2).flatten(0, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rows[hidden[..., 0].long()]


def feed(module: nn.Module, **projections: Tensor) -> Tensor:
    """Hidden states (batch, length, width) from which the named projections of `module` make these tensors.

    Each is (batch, heads, length, head_dim). Hidden states may be transposed or selected on the way.
    """
    for name, x in projections.items():
        assert isinstance(getattr(module, name), nn.Linear), f"{type(module).__name__} has no projection {name}"
        setattr(module, name, Lookup(x))
    b, h, n, d = x.shape
    return torch.arange(b * n, dtype=x.dtype).view(b, n, 1).expand(b, n, h * d).clone()


def split_heads(out: Tensor) -> Tensor:
    """(batch, length, width) to (batch, heads, length, head_dim)."""
    return out.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def leaves(length: int, logit_scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Gaussian q, k, v that receive gradients."""
    return tuple(x.requires_grad_() for x in gaussian(length, logit_scale=logit_scale, dtype=dtype))


def real_tokens(length: int, *counts: int, left: bool = False) -> Tensor:
    """The padding mask of examples with so many real tokens, padded on the right or on the left."""
    mask = torch.arange(length) < torch.tensor(counts)[:, None]
    return mask.flip(-1) if left else mask


def assert_agree(
    found: Tensor,
    expected: Tensor,
    tolerance: float,
    *,
    inputs: tuple[Tensor, ...] = (),
    mask: Tensor | None = None,
) -> None:
    """Rows of real tokens agree, and so do the gradients that a random direction sends to `inputs`."""
    rows = torch.ones(found.shape[:3], dtype=torch.bool)
    rows = rows if mask is None else mask[:, None].expand_as(rows)
    assert rows.any()
    assert_close(found[rows], expected[rows], tolerance, "against the oracle")
    if inputs:
        direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
        direction = direction * rows[..., None]
        ours, theirs = (torch.autograd.grad(out, inputs, direction, retain_graph=True) for out in (found, expected))
        for name, x, y in zip("qkv" if len(inputs) == 3 else "qv", ours, theirs, strict=True):
            assert_close(x, y, tolerance, f"gradient of {name} against the oracle's")
