"""The sliding policy is the operator `streaming`, however the tokens come."""

import pytest
import torch

from attnlens.attention.streaming import Streaming
from attnlens.cache.sliding import Sliding
from attnlens.linalg.suffix import repeat_groups
from tests.cache.policies import drawn, run


@pytest.mark.parametrize("num_sinks", [0, 1, 4])
@pytest.mark.parametrize("window", [1, 2, 7, 40])
@pytest.mark.parametrize("pieces", [[1] * 32, [32], [3, 1, 15, 1, 1, 7, 4], [20, *[1] * 12]])
def test_equals_the_operator_however_the_tokens_come(num_sinks, window, pieces):
    q, k, v = drawn(32)
    v = v[..., :6]
    operator = Streaming(window, num_sinks)
    expected = operator(q, *(repeat_groups(x, 4) for x in (k, v)), causal=True)
    state, out = run(Sliding(window, num_sinks), pieces, q, k, v)
    torch.testing.assert_close(out, expected)
    assert state.stored.keys.length == min(32, num_sinks + window)
