"""Choosing keys by score and attending to the chosen: against loops and dense masks, with ties, padding and NaN."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnlens.linalg.dense import softmax_weights
from attnlens.linalg.selected import (
    ROWS,
    dropped_mass,
    selected_attention,
    top_indices,
    top_keys,
    value_diameter,
)
from attnlens.testing.inputs import gaussian


def visible_pairs(n, m, causal, mask):
    seen = torch.ones(n, m, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    return seen[None] if mask is None else seen & mask[:, None]


def chosen_naive(scores, size):
    """Positions of the largest scores, the first of equal ones, by Python's stable sort."""
    rows = scores.flatten(0, -2).tolist()
    order = [sorted(range(len(row)), key=lambda j, row=row: -row[j])[:size] for row in rows]
    return torch.tensor(order).view(*scores.shape[:-1], size)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9])
def test_the_largest_and_of_equal_ones_the_first(size):
    generator = torch.Generator().manual_seed(size)
    for scores in (
        torch.randn(3, 4, 9, generator=generator),
        torch.randint(0, 3, (3, 4, 9), generator=generator).double(),
        torch.zeros(1, 2, 9),
        torch.randint(0, 2, (3, 4, 9), generator=generator).float().log(),
    ):
        found, expected = top_indices(scores, size).sort(-1).values, chosen_naive(scores, size).sort(-1).values
        assert torch.equal(found, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, ROWS, 2 * ROWS + 3])
def test_chunks_choose_what_the_dense_scores_do(length, causal):
    q, k, _ = gaussian(length)
    mask = torch.arange(length) < torch.tensor([length, (length + 1) // 2])[:, None]
    for padding in (None, mask):
        index, visible = top_keys(q, k, 6, causal=causal, key_padding_mask=padding)
        seen = visible_pairs(length, length, causal, padding)[:, None].expand(2, 2, -1, -1)
        scores = (q @ k.mT).masked_fill(~seen, -torch.inf)
        expected = torch.zeros_like(seen).scatter_(-1, scores.topk(min(6, length)).indices, True) & seen
        found = torch.zeros(seen.shape).scatter_add_(-1, index, visible.to(torch.float32))
        assert torch.equal(found, expected.float()), "every chosen key once, and no other"


@pytest.mark.parametrize("length", [40, ROWS + 30])
def test_both_forms_equal_the_dense_mask_forward_and_backward(length):
    """Below and above the length where keys are gathered; rows without any key and gradients of lse included."""
    tensors = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    q, k, v = tensors
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(2, 2, length, length, generator=generator).argsort(-1)[..., :7]
    visible = torch.rand(index.shape, generator=generator) < 0.7
    visible[0, 0, 3] = False
    out, lse = selected_attention(q, k, v, index, visible)
    seen = torch.zeros(2, 2, length, length).scatter_add_(-1, index, visible.float()) > 0
    scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
    some = seen.any(-1)
    weights = torch.softmax(scores.masked_fill(~some[..., None], 0), -1) * some[..., None]
    torch.testing.assert_close(out, weights @ v, atol=1e-12, rtol=1e-12)
    assert (lse[~some] == -torch.inf).all()
    torch.testing.assert_close(lse[some], torch.logsumexp(scores[some], -1), atol=1e-12, rtol=1e-12)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((out * cotangent).sum() + lse[some].sin().sum(), tensors)
    expected = torch.autograd.grad(
        ((weights @ v) * cotangent).sum() + torch.logsumexp(scores[some], -1).sin().sum(), tensors
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


class _Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_no_tensor_is_larger_than_a_chunk_of_rows():
    length = 8 * ROWS
    q, k, v = (x.requires_grad_() for x in gaussian(length, batch=1))
    with _Largest() as largest:
        index, visible = top_keys(q, k, 4, causal=False, key_padding_mask=None)
        selected_attention(q, k, v, index, visible)[0].sum().backward()
    assert largest.numel <= 2 * ROWS * length, "two heads of one chunk"


@pytest.mark.parametrize("length", [30, ROWS + 5])
def test_a_nan_query_keeps_its_slots_and_gives_nan(length):
    q, k, v = gaussian(length)
    q[0, 1, 7] = torch.nan
    mask = torch.arange(length) < torch.tensor([length, 9])[:, None]
    for causal in (False, True):
        for padding in (None, mask):
            index, visible = top_keys(q, k, 4, causal=causal, key_padding_mask=padding)
            bad = selected_attention(q, k, v, index, visible)[0].isnan().any(-1)
            assert bad[0, 1, 7]
            assert bad.sum() == 1


@pytest.mark.parametrize("causal", [False, True])
def test_dropped_mass_and_diameter_equal_loops(causal):
    q, k, v = gaussian(12)
    mask = torch.arange(12) < torch.tensor([12, 5])[:, None]
    index, visible = top_keys(q, k, 3, causal=causal, key_padding_mask=mask)
    found = dropped_mass(q, k, index, causal=causal, key_padding_mask=mask)
    weights = softmax_weights(q, k, causal=causal, key_padding_mask=mask)
    kept = (weights.gather(-1, index) * visible).sum(-1)
    torch.testing.assert_close(found, 1 - kept, atol=1e-14, rtol=0)
    spread = value_diameter(v, causal=causal, key_padding_mask=mask).expand(2, 2, 12)
    for example, count in ((0, 12), (1, 5)):
        for row in range(12):
            values = v[example, 1, : min(row + 1, count) if causal else count]
            longest = max((a - b).norm() for a in values for b in values)
            torch.testing.assert_close(spread[example, 1, row], longest, atol=1e-7, rtol=0)
