"""Two resolutions: a dense oracle by its definition, correct row sums, the choice of blocks, bound and cost.

The published CUDA form returns zeros on a machine without a GPU, so that the oracle is written here.
"""

import pytest
import torch

from attnlens.analysis.flops import measure_flops
from attnlens.attention.mra import Mra
from attnlens.attention.window import Window
from attnlens.linalg.dense import softmax_naive
from attnlens.testing.inputs import EXACT, gaussian


def dense(q, k, v, b, r, mask, causal, variance=False):
    """One example and head at a time: chosen blocks, then a row of weights over single keys and block means."""
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    blocks = [list(range(start, min(start + b, n))) for start in range(0, n, b)]
    for e, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        real = [[j for j in block if mask[e, j]] for block in blocks]
        for own, rows in enumerate(real):
            asked = real[own - 1] if causal and own else rows
            others = [x for x, held in enumerate(real) if held and (x < own or (x > own and not causal))]
            # The mean of no query at all is the zero vector.
            mean = q[e, h, asked].sum(0) / max(1, len(asked))
            score = {x: len(real[x]) * torch.exp(mean @ k[e, h, real[x]].mean(0) * scale) for x in others}
            chosen = sorted(others, key=lambda x, score=score: -score[x].item())[: r - 1]
            for i in rows:
                query = q[e, h, i]
                single = [j for x in (own, *chosen) for j in real[x] if j <= i or not causal]
                scores, values = [query @ k[e, h, j] * scale for j in single], [v[e, h, j] for j in single]
                for held in (real[x] for x in others if x not in chosen):
                    keys = k[e, h, held]
                    mass = query @ keys.mean(0) * scale + torch.tensor(len(held), dtype=q.dtype).log()
                    if variance:
                        mass = mass + (query.square() * keys.var(0, correction=0)).sum() * scale**2 / 2
                    scores.append(mass)
                    values.append(v[e, h, held].mean(0))
                out[e, h, i] = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "b", "r"), [(7, 1, 2), (22, 4, 1), (25, 4, 3), (27, 3, 4), (30, 2, 14)])
def test_equals_the_dense_form_forward_and_backward(length, b, r, causal, variance):
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.7
    mask[0] = True
    op = Mra(r, b, variance)
    found = torch.where(mask[:, None, :, None], op(*inputs, causal=causal, key_padding_mask=mask), 0)
    expected = dense(*inputs, b, r, mask, causal, variance)
    assert torch.allclose(found, expected, atol=EXACT)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.autograd.grad(out, inputs, direction, retain_graph=True) for out in (found, expected))
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in zip(ours, theirs, strict=True))


def test_parts_of_a_long_sequence_equal_the_whole(monkeypatch):
    """Rows are taken some at a time."""
    q, k, v = gaussian(70)
    for causal in (False, True):
        whole = Mra(2, 4)(q, k, v, causal=causal)
        monkeypatch.setattr("attnlens.attention.mra.ROWS", 9)
        assert torch.allclose(Mra(2, 4)(q, k, v, causal=causal), whole, atol=EXACT)
        monkeypatch.undo()


@pytest.mark.parametrize("causal", [False, True])
def test_a_coarse_block_weighs_as_many_keys_as_it_has(causal):
    """At q = 0 softmax is the mean of the values; without the counts a block would weigh as one key."""
    q, k, v = gaussian(45)
    zero = torch.zeros_like(q)
    weights = Mra(1, 4)(zero, k, torch.eye(45, dtype=v.dtype).expand(2, 2, -1, -1), causal=causal)
    real = torch.ones(45, 45, dtype=v.dtype)
    real = real.tril() if causal else real
    assert torch.allclose(weights, (real / real.sum(-1, keepdim=True)).expand_as(weights), atol=EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_a_far_block_that_matters_is_refined(causal):
    """A needle that a window of the same number of keys does not reach."""
    q, k, v = gaussian(256)
    k[:, :, 16:24] += 2 * q.mean(2, keepdim=True)
    direction = torch.ones(8, dtype=q.dtype)
    q, k[:, :, 16:24] = q + 2 * direction, k[:, :, 16:24] + 2 * direction
    exact = softmax_naive(q, k, v, causal=causal)[:, :, 64:]
    found = (Mra(4, 8)(q, k, v, causal=causal)[:, :, 64:] - exact).norm() / exact.norm()
    window = (Window(32)(q, k, v, causal=causal)[:, :, 64:] - exact).norm() / exact.norm()
    assert found < 0.1
    assert found < window / 5


@pytest.mark.parametrize("causal", [False, True])
def test_error_falls_as_blocks_are_refined(causal):
    q, k, v = gaussian(128)
    exact = softmax_naive(q, k, v, causal=causal)
    errors = [(Mra(r, 8)(q, k, v, causal=causal) - exact).norm().item() for r in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < EXACT


def test_the_choice_does_not_read_the_future_within_its_own_block():
    """The mean query of the own block would: its last row changes what its first row sees."""
    q, k, v = gaussian(64)
    op = Mra(2, 8)
    before = op(q, k, v, causal=True)
    for t in range(40, 48):
        changed = q.clone()
        changed[:, :, t] = -40 * q[:, :, t]
        after = op(changed, k, v, causal=True)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
    bidirectional = op(q, k, v)
    changed = q.clone()
    changed[:, :, 47] = -40 * q[:, :, 47]
    assert not torch.equal(op(changed, k, v)[:, :, 40:47], bidirectional[:, :, 40:47])


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_the_bound_holds_with_padding(causal, scale, variance):
    q, k, v = gaussian(50, logit_scale=scale)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < 0.8
    op = Mra(3, 4, variance)
    exact = op.reference(q, k, v, causal=causal, key_padding_mask=mask)
    error = (op(q, k, v, causal=causal, key_padding_mask=mask) - exact).norm(dim=-1)
    bound = op.error_bound(q, k, v, causal=causal, key_padding_mask=mask)
    rows = mask[:, None].expand_as(error)
    assert (error[rows] <= bound[rows] + EXACT).all()
    assert bound[rows].median() < 100 * error[rows].median(), "a bound that says nothing"


def test_cost_is_n_to_the_three_halves_at_blocks_of_root_n():
    counts = []
    for n in (256, 1024, 4096):
        inputs = gaussian(n, batch=1, dtype=torch.float32)
        op = Mra(2, int(n**0.5))
        counts.append(measure_flops(lambda q, k, v, op=op: op(q, k, v), *inputs).flops)
    assert counts[1] < 8.4 * counts[0]
    assert counts[2] < 8.4 * counts[1]


@pytest.mark.parametrize("argument", ["num_blocks", "block_size"])
def test_bad_arguments_are_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be at least 1, got 0"):
        Mra(**{"num_blocks": 2, "block_size": 4, argument: 0})
