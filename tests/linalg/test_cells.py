"""Cells against loops over their tokens, lists against their definition, and every key met exactly once."""

import pytest
import torch

from attnlens.linalg.cells import (
    Refinement,
    all_far,
    interaction_list,
    leaves,
    listed_attention,
    near_attention,
    neighbors,
    parents,
    visible_points,
)
from attnlens.testing.inputs import EXACT, gaussian

CPU = torch.device("cpu")


def levels(k, v, size, refinement, mask, number):
    cells = leaves(k, v, size, refinement, mask)
    for _ in range(number):
        yield cells
        cells = parents(cells, refinement)


@pytest.mark.parametrize("by_content", [False, True])
@pytest.mark.parametrize(
    ("length", "size", "points"), [(1, 1, 1), (5, 2, 1), (23, 4, 3), (37, 3, 5), (64, 8, 8), (70, 5, 2)]
)
def test_points_are_the_means_of_disjoint_sets_that_hold_every_real_token(length, size, points, by_content):
    """Values of the identity tell which tokens a point holds; key, count and variance are those of these tokens."""
    k = gaussian(length)[1]
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.7
    mask[0] = True
    k = torch.where(mask[:, None, :, None], k, 0)
    eye = torch.eye(length, dtype=k.dtype).expand(2, 2, -1, -1) * mask[:, None, :, None]
    refinement = Refinement(points, True, by_content)
    for level, cells in enumerate(levels(k, eye, size, refinement, mask, 4)):
        assert cells.keys.shape[2] <= points
        for head in range(4):
            seen = torch.zeros(length)
            for cell in range(cells.keys.shape[1]):
                for point in range(cells.keys.shape[2]):
                    held = cells.values[head, cell, point] > 0
                    assert cells.num_tokens[head, cell, point] == held.sum()
                    seen += held
                    if not held.any():
                        continue
                    assert held.nonzero().min() // (size << level) == held.nonzero().max() // (size << level) == cell
                    tokens = k[head // 2, head % 2, held]
                    assert torch.allclose(cells.keys[head, cell, point], tokens.mean(0), atol=EXACT)
                    if cells.variance is not None:
                        found = cells.variance[head, cell, point]
                        assert torch.allclose(found, tokens.var(0, correction=0), atol=EXACT)
            assert torch.equal(seen, mask[head // 2].float())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_cells", range(1, 20))
def test_lists_by_their_definition(num_cells, causal):
    far, beside = interaction_list(num_cells, causal, CPU), neighbors(num_cells, causal, CPU)
    rest = all_far(num_cells, causal, CPU)
    for own in range(num_cells):
        allowed = set(range(own if causal else num_cells))
        close = {own - 1, own, own + 1}
        family = {2 * parent + child for parent in range(own // 2 - 1, own // 2 + 2) for child in (0, 1)}
        for table, wanted in (
            (far, (family - close) & allowed),
            (beside, (close - {own}) & allowed),
            (rest, allowed - close),
        ):
            found = [j for j in table[own].tolist() if j >= 0]
            assert len(found) == len(set(found))
            assert set(found) == wanted


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 12, 33, 70])
def test_every_key_is_met_exactly_once(length, size, causal):
    position = torch.arange(length)
    leaf = position // size
    gap = leaf[:, None] - leaf
    met = (position[:, None] >= position).int() * (gap <= 1) if causal else (gap.abs() <= 1).int()
    cell_size, num_cells = size, -(-length // size)
    while num_cells > 2:
        table = interaction_list(num_cells, causal, CPU)
        cell = position // cell_size
        met = met + visible_points(table, 1)[cell][:, cell]
        cell_size, num_cells = 2 * cell_size, -(-num_cells // 2)
    expected = torch.ones(length, length, dtype=torch.long)
    assert torch.equal(met, expected.tril() if causal else expected)


@pytest.mark.parametrize("variance", [False, True])
def test_listed_attention_equals_its_dense_form_forward_and_backward(variance):
    """The variance term included, which enters through the queries and the keys and has a gradient in both."""
    inputs = [x.requires_grad_() for x in gaussian(26, batch=1, value_dim=5)]
    q, k, v = inputs
    coarse = leaves(k, v, 4, Refinement(2, variance), None)
    tokens = leaves(k, v, 4, Refinement(4), None)
    far, beside = interaction_list(7, False, CPU), neighbors(7, False, CPU)
    rows = leaves(q, q, 4, Refinement(4), None).keys
    found = listed_attention(rows, [(coarse, far), (tokens, beside)])
    scores, values = [], []
    for cells, table in ((coarse, far), (tokens, beside)):
        keys = cells.keys.flatten(1, 2)[:, None]
        score = rows @ keys.mT * 8**-0.5 + cells.num_tokens.flatten(1)[:, None, None].log()
        if cells.variance is not None:
            score = score + rows.square() @ cells.variance.flatten(1, 2)[:, None].mT / 16
        scores.append(score.masked_fill(~visible_points(table, cells.keys.shape[2])[None, :, None], -torch.inf))
        values.append(cells.values.flatten(1, 2))
    scores = torch.cat(scores, -1)
    expected = torch.softmax(scores, -1) @ torch.cat(values, 1)[:, None], torch.logsumexp(scores, -1)
    cotangents = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) for x in found]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=EXACT)
    ours = torch.autograd.grad(found, inputs, cotangents, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(expected, inputs, cotangents), strict=True):
        assert torch.allclose(a, b, atol=EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_near_attention_is_softmax_over_three_leaves(causal):
    q, k, v = gaussian(23)
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(0)) < 0.7
    k, v = (torch.where(mask[:, None, :, None], x, 0) for x in (k, v))
    out, lse = near_attention(q, k, v, 4, causal=causal, key_padding_mask=mask)
    leaf = torch.arange(23) // 4
    near = (leaf[:, None] - leaf).abs() <= 1
    near = near.tril() if causal else near
    scores = (q @ k.mT * 8**-0.5).masked_fill(~(near & mask[:, None, None]), -torch.inf)
    assert torch.allclose(lse, torch.logsumexp(scores, -1), atol=EXACT)
    assert torch.allclose(out, torch.softmax(scores, -1).nan_to_num() @ v, atol=EXACT)
