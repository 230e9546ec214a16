"""Inputs and tolerances of the contract, in one place."""

import torch
from torch import Tensor

LENGTHS = (1, 2, 5, 64, 70)
MAX_LENGTH = 128
HEADS = 2
HEAD_DIM = 8
# float64 round-off after the cancellations of an exponential, a solve or a sort of ties.
EXACT = 1e-8
# float32 against itself on another path.
SINGLE = 2e-4


def gaussian(
    length: int,
    *,
    batch: int = 2,
    head_dim: int = HEAD_DIM,
    value_dim: int | None = None,
    arity: int = 1,
    logit_scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q, k, v whose logits <q, k>/sqrt(d) have standard deviation `logit_scale`.

    For an operator of higher `arity` so many keys and values stand side by side, and the logit is the multilinear form
    sum_c q_c k1_c ... k_arity,c / sqrt(d). `value_dim` is that of the output.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        return torch.randn(batch, HEADS, length, width, generator=generator, dtype=torch.float64)

    q, k, v = draw(head_dim), draw(arity * head_dim), draw(arity * (value_dim or head_dim))
    root = logit_scale ** (1 / (1 + arity))
    return (q * root).to(dtype), (k * root).to(dtype), v.to(dtype)


def dimensions(head_dim: int = HEAD_DIM, max_length: int = MAX_LENGTH, seed: int = 0) -> dict[str, int]:
    """The dimensions and the seed that a factory receives."""
    return {"head_dim": head_dim, "num_heads": HEADS, "max_length": max_length, "seed": seed}


def modes(operator_causal: bool) -> tuple[bool, ...]:
    """Bidirectional, and causal where the operator can."""
    return (False, True) if operator_causal else (False,)


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Largest difference relative to the scale of `expected`; NaN counts as a difference."""
    scale = max(1.0, expected.abs().max().item())
    gap = (found - expected).abs().max().item() / scale
    assert gap <= tolerance, f"{what}: differs by {gap:.2e} (allowed {tolerance:.0e})"
