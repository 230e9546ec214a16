"""Fixed patterns at twice the length: twice the pairs, twice the largest tensor, never a length x length one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnlens.analysis.flops import measure_flops
from attnlens.attention.bigbird import BigBird
from attnlens.attention.longformer import Longformer
from attnlens.attention.streaming import Streaming
from attnlens.attention.strided import Strided
from attnlens.attention.window import Window
from attnlens.testing.inputs import gaussian

OPERATORS = {
    "window": lambda n: Window(16),
    "streaming": lambda n: Streaming(16, 4),
    "longformer": lambda n: Longformer(16, 4),
    "bigbird": lambda n: BigBird(16, 2, n, 0, 1, 2),
    "strided": lambda n: Strided(16, n // 32),
    "fixed": lambda n: Strided(16, n // 32, 1),
}


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that an operation returned."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.size = max([self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def cost(name, length, causal, padded):
    """(pairs visited, largest tensor forward and backward) of one example; the stride keeps n / l at 32."""
    inputs = gaussian(length, batch=1, dtype=torch.float32)
    mask = torch.ones(1, length, dtype=torch.bool) if padded else None
    operator = OPERATORS[name](length)
    visited = measure_flops(lambda *x: operator(*x[:3], causal=causal, key_padding_mask=x[3]), *inputs, mask).visited
    with LargestTensor() as largest:
        operator(*(x.requires_grad_() for x in inputs), causal=causal, key_padding_mask=mask).sum().backward()
    return visited, largest.size


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_work_and_memory_grow_with_the_length_only(name, padded, causal):
    visited, size = cost(name, 1024, causal, padded)
    twice_visited, twice_size = cost(name, 2048, causal, padded)
    assert twice_visited <= 2.1 * visited
    assert twice_size <= 2.1 * size
    assert twice_size < 2048**2 / 4
