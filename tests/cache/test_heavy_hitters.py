"""H2O beside loops over tokens."""

import math

import pytest
import torch

from attnlens.cache.heavy_hitters import HeavyHitters
from tests.cache.policies import drawn, run


def by_loops(heavy, recent, pieces, q, k, v):
    """One batch row and group: the outputs, and the tokens that remain with their scores."""
    kept, scores, outputs, start = [], {}, [], 0
    for n in pieces:
        new = list(range(start, start + n))
        kept, scores, start = kept + new, scores | dict.fromkeys(new, 0.0), start + n
        for i in new:
            seen = [j for j in kept if j <= i]
            rows = []
            for head in q:
                logits = [float(head[i] @ k[j]) / math.sqrt(k.shape[1]) for j in seen]
                total = sum(math.exp(x) for x in logits)
                weights = [math.exp(x) / total for x in logits]
                rows.append(sum(w * v[j] for w, j in zip(weights, seen, strict=True)))
                for w, j in zip(weights, seen, strict=True):
                    scores[j] += w
            outputs.append(torch.stack(rows))
        while len(kept) > heavy + recent:
            kept.remove(min(kept[: len(kept) - recent], key=scores.__getitem__))
    return torch.stack(outputs, 1), kept, [scores[j] for j in kept]


@pytest.mark.parametrize(("heavy", "recent"), [(1, 1), (4, 3), (2, 8)])
@pytest.mark.parametrize("pieces", [[1] * 24, [24], [10, *[1] * 8, 4, 2]])
def test_equals_loops_over_tokens(heavy, recent, pieces):
    q, k, v = drawn(24)
    state, out = run(HeavyHitters(heavy, recent), pieces, q, k, v)
    for row in range(2):
        for group in range(2):
            heads = slice(2 * group, 2 * group + 2)
            expected, kept, scores = by_loops(heavy, recent, pieces, q[row, heads], k[row, group], v[row, group])
            torch.testing.assert_close(out[row, heads], expected)
            torch.testing.assert_close(state.stored.keys.tensor[row, group], k[row, group, kept])
            torch.testing.assert_close(state.memory[row, group], torch.tensor(scores, dtype=torch.float64))


def test_a_key_that_all_queries_want_is_never_dropped():
    """A needle at the front outlives any number of tokens; under a window of the same size it is gone."""
    q, k, v = drawn(60)
    k[:, :, 0] = 0
    k[:, :, 0, 0], q[..., 0], k[:, :, 1:, 0] = 8.0, 8.0, 0.0
    state, _ = run(HeavyHitters(2, 4), [1] * 60, q, k, v)
    torch.testing.assert_close(state.stored.values.tensor[:, :, 0], v[:, :, 0])
