"""SnapKV beside loops over tokens."""

import math

import pytest
import torch

from attnlens.cache.full import Full
from attnlens.cache.snapkv import SnapKV
from tests.cache.policies import drawn, run


def chosen_by_loops(budget, window, kernel, q, k):
    """The tokens of a prompt that one group keeps."""
    n = k.shape[0]
    votes = [0.0] * (n - window)
    for head in q:
        for i in range(n - window, n):
            exps = [math.exp(float(head[i] @ k[j]) / math.sqrt(k.shape[1])) for j in range(i + 1)]
            for j in range(n - window):
                votes[j] += exps[j] / sum(exps)
    reach = kernel // 2
    pooled = [sum(votes[max(0, j - reach) : j + reach + 1]) / kernel for j in range(n - window)]
    best = sorted(range(n - window), key=lambda j: -pooled[j])[: budget - window]
    return sorted(best) + list(range(n - window, n))


@pytest.mark.parametrize(("budget", "window", "kernel"), [(8, 3, 1), (8, 3, 5), (12, 1, 3), (4, 4, 3)])
def test_a_prompt_keeps_what_its_last_queries_vote_for(budget, window, kernel):
    q, k, v = drawn(30)
    state, _ = run(SnapKV(budget, window, kernel), [24, *[1] * 6], q, k, v)
    for row in range(2):
        for group in range(2):
            heads = slice(2 * group, 2 * group + 2)
            kept = chosen_by_loops(budget, window, kernel, q[row, heads, :24], k[row, group, :24])
            kept += range(24, 30)
            torch.testing.assert_close(state.stored.keys.tensor[row, group], k[row, group, kept])
            torch.testing.assert_close(state.stored.values.tensor[row, group], v[row, group, kept])


def test_decoding_attends_to_what_was_kept_and_all_that_came_since():
    q, k, v = drawn(30)
    state, out = run(SnapKV(8, 3), [24, *[1] * 6], q, k, v)
    last, _ = run(SnapKV(8, 3), [24, *[1] * 5], q, k, v)
    keys, values = (torch.cat([x.tensor, new[:, :, 29:]], 2) for x, new in zip(last.stored, (k, v), strict=True))
    assert keys.shape[2] == 14
    queries = torch.cat([q[:, :, :13], q[:, :, 29:]], 2)
    expected = run(Full(), [14], queries, keys, values)[1][:, :, -1:]
    torch.testing.assert_close(out[:, :, 29:], expected)
    assert state.memory is True


def test_token_by_token_there_is_no_prompt_and_nothing_is_dropped():
    parts = drawn(30)
    assert torch.equal(run(SnapKV(4, 2), [1] * 30, *parts)[1], run(Full(), [1] * 30, *parts)[1])
