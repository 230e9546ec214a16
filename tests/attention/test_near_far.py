"""Band and linear attention in learned proportions, against its definition and its two ends."""

import pytest
import torch

from attnlens.analysis.flops import measure_flops
from attnlens.attention.linear import linear_naive
from attnlens.attention.near_far import NearFar
from attnlens.linalg.dense import softmax_naive
from attnlens.testing.inputs import EXACT, gaussian


def operator(window, theta=(0.7, -1.2), num_kernels=2):
    op = NearFar(window, num_heads=2, num_kernels=num_kernels).double()
    op.theta.data = torch.tensor(theta, dtype=torch.float64)
    return op


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window", "kernels"), [(1, 1, 2), (5, 2, 1), (26, 4, 2), (70, 16, 1), (33, 40, 2)])
def test_equals_the_definition_forward_and_backward(length, window, kernels, causal):
    """The gradient of the proportions too."""
    op = operator(window, num_kernels=kernels)
    inputs = [x.requires_grad_() for x in gaussian(length, value_dim=5)]
    mask = torch.arange(length) < torch.tensor([length, max(1, length // 2)])[:, None]
    found, expected = (
        torch.where(mask[:, None, :, None], f(*inputs, causal=causal, key_padding_mask=mask), 0)
        for f in (op, op.reference)
    )
    assert torch.allclose(found, expected, atol=EXACT)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = [*inputs, op.theta]
    ours, theirs = (torch.autograd.grad(out, leaves, direction, retain_graph=True) for out in (found, expected))
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in zip(ours, theirs, strict=True))
    assert (ours[-1].abs().min() > 1e-6) == (length > 1)


def test_definition_entry_by_entry():
    """The matrix of one head, pair by pair."""
    q, k, _ = gaussian(9)
    weights = operator(3).matrix(q, k, causal=True)[0, 1]
    share = torch.sigmoid(torch.tensor(-1.2, dtype=torch.float64))
    q, k = q[0, 1], k[0, 1]

    def feature(x):
        return torch.where(x > 0, x + 1, x.exp())

    for i in range(9):
        row = torch.zeros(9, dtype=torch.float64)
        near = range(max(0, i - 2), i + 1)
        row[near.start : i + 1] = share * torch.softmax(torch.stack([q[i] @ k[j] for j in near]) * 8**-0.5, 0)
        for sign in (1, -1):
            far = torch.stack([feature(sign * q[i]) @ feature(sign * k[j]) for j in range(i + 1)])
            row[: i + 1] += (1 - share) / 2 * far / far.sum()
        assert torch.allclose(weights[i], row, atol=EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_the_two_ends(causal):
    """All near with a window over everything is softmax attention, all far with one kernel is linear attention."""
    q, k, v = gaussian(40)
    near = operator(40, theta=(40.0, 40.0))(q, k, v, causal=causal)
    assert torch.allclose(near, softmax_naive(q, k, v, causal=causal), atol=EXACT)
    far = operator(2, theta=(-40.0, -40.0), num_kernels=1)(q, k, v, causal=causal)
    assert torch.allclose(far, linear_naive(q, k, v, causal=causal), atol=EXACT)


def test_two_kernels_tell_a_key_from_its_opposite():
    """With the features of x alone a negative entry counts for next to nothing; those of -x see it. A key opposed to
    the query weighs less under both than a key like it."""
    q = torch.full((1, 2, 1, 8), -2.0, dtype=torch.float64).expand(-1, -1, 2, -1)
    k = torch.stack([q[:, :, 0], -q[:, :, 0]], 2)
    one, two = (operator(1, (-40.0, -40.0), num_kernels=c).matrix(q, k)[0, 0, 0] for c in (1, 2))
    assert one[0] < one[1], "elu + 1 alone prefers the opposite key"
    assert two[0] > one[0] + 0.3


def test_far_field_is_low_rank_and_near_field_banded():
    """Outside the band the matrix is that of rank 2 (d) at most: a corner that the band does not touch shows it."""
    q, k, _ = gaussian(80)
    corner = operator(8).matrix(q, k)[..., 40:, :30]
    values = torch.linalg.svdvals(corner)
    assert values[..., 16:].max() < EXACT
    assert values[..., 0].min() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_cost_is_linear(causal):
    op, counts = NearFar(16, 2), []
    for n in (1024, 2048, 4096):
        inputs = gaussian(n, batch=1, dtype=torch.float32)
        counts.append(measure_flops(lambda q, k, v: op(q, k, v, causal=causal), *inputs).flops)
    assert counts[1] < 2.05 * counts[0]
    assert counts[2] < 2.05 * counts[1]


@pytest.mark.parametrize(("argument", "value"), [("window", 0), ("num_kernels", 0), ("num_kernels", 3)])
def test_bad_arguments_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be .*, got {value}"):
        NearFar(**{"window": 4, "num_heads": 2, argument: value})
