"""Every operator on a GPU gives what it gives on a CPU, outputs and gradients; skipped where there is none."""

from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.testing.inputs import EXACT, SINGLE, dimensions, gaussian, modes

CONF = Path(__file__).parents[2] / "conf" / "attention"
METHODS = sorted(path.stem for path in CONF.glob("*.yaml"))

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def run(operator, tensors, device, **options):
    """Output and gradients of an operator on a device, brought back to the CPU."""
    leaves = [x.detach().to(device).requires_grad_() for x in tensors]
    mask = options.pop("mask")
    out = operator.to(device)(*leaves, key_padding_mask=None if mask is None else mask.to(device), **options)
    shown = out if mask is None else out[mask.to(device)[:, None].expand(out.shape[:3])]
    grads = torch.autograd.grad(shown.square().sum(), leaves, allow_unused=True)
    return [x.detach().cpu() for x in (shown, *grads) if x is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [5, 70, 128])
@pytest.mark.parametrize("method", METHODS)
def test_gpu_equals_cpu(method, length, padded, dtype):
    factory = partial(build, OmegaConf.load(CONF / f"{method}.yaml"))
    tensors = gaussian(length, arity=factory(**dimensions()).arity, dtype=dtype)
    mask = torch.arange(length) < torch.tensor([length, max(1, length - 3)])[:, None] if padded else None
    for causal in modes(factory(**dimensions()).causal):
        found, expected = (
            run(factory(**dimensions()).to(dtype), tensors, device, causal=causal, mask=mask)
            for device in ("cuda", "cpu")
        )
        for x, y in zip(found, expected, strict=True):
            gap = (x - y).abs().max() / y.abs().max().clamp_min(1)
            assert gap <= (EXACT if dtype == torch.float64 else 5 * SINGLE), f"causal={causal}: {gap:.1e}"
