"""The chunked scan against the recurrence token by token, forward and backward, in all its forms."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnlens.linalg.decay import bounded_decay
from attnlens.linalg.scan import chunk_length, chunked_scan


def draw(length, *, decay, delta, start, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = gaussian(2, 3, length, 4), F.normalize(gaussian(2, 3, length, 4), dim=-1), gaussian(2, 3, length, 5)
    log_decay = -gaussian(2, 3, length).abs() if decay else None
    beta = gaussian(2, 3, length).sigmoid() if delta else None
    state = gaussian(2, 3, 4, 5) if start else None
    return [None if x is None else x.to(dtype).requires_grad_() for x in (q, k, v, log_decay, beta, state)]


def token_by_token(q, k, v, log_decay, beta, state):
    outs = []
    state = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype) if state is None else state
    for i in range(q.shape[2]):
        if log_decay is not None:
            state = log_decay[:, :, i, None, None].exp() * state
        write = v[:, :, i]
        if beta is not None:
            write = beta[:, :, i, None] * (write - torch.einsum("bhd,bhde->bhe", k[:, :, i], state))
        state = state + torch.einsum("bhd,bhe->bhde", k[:, :, i], write)
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, i], state))
    return state, torch.stack(outs, 2)


def scan(q, k, v, log_decay, beta, state, **options):
    return chunked_scan(q, k, v, log_decay=log_decay, beta=beta, state=state, final_state=True, **options)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_chunks_equal_single_tokens_forward_and_backward(length, decay, delta, start):
    inputs = draw(length, decay=decay, delta=delta, start=start)
    given = [x for x in inputs if x is not None]
    found, expected = scan(*inputs, chunk=8), token_by_token(*inputs)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, given, cotangents), torch.autograd.grad(expected, given, cotangents), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("delta", [False, True])
def test_without_a_final_state_the_gradients_are_those_of_the_outputs(delta):
    inputs = draw(20, decay=True, delta=delta, start=True)
    given = [x for x in inputs if x is not None]
    q, k, v, log_decay, beta, state = inputs
    after, out = chunked_scan(q, k, v, log_decay=log_decay, beta=beta, state=state, chunk=8)
    assert after is None
    expected = torch.autograd.grad(token_by_token(*inputs)[1].square().sum(), given)
    for a, b in zip(torch.autograd.grad(out.square().sum(), given), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_pieces_of_any_length_give_one_run():
    q, k, v, log_decay, beta, state = (x.detach() for x in draw(50, decay=True, delta=True, start=True))
    last, whole = scan(q, k, v, log_decay, beta, state, chunk=16)
    for cuts in ([0, 50], [0, 1, 16, 33, 50], list(range(51))):
        outs, now = [], state
        for a, b in pairwise(cuts):
            now, out = scan(*(x[:, :, a:b] for x in (q, k, v, log_decay, beta)), now)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(now, last, atol=1e-12, rtol=1e-12)


def test_decays_far_below_the_number_range_neither_overflow_nor_blur_what_follows():
    """Running sums of log decays lose their last digits to one decay of e^{-1000000}; taken apart they overflow."""
    inputs = draw(64, decay=True, delta=True, start=False, dtype=torch.float32)
    with torch.no_grad():
        inputs[3][:, :, 20] = -1e6
        inputs[3][:, :, 40:44] = -300.0
        inputs[3].copy_(bounded_decay(inputs[3]))
    exact = token_by_token(*(None if x is None else x.double() for x in inputs))[1]
    out = scan(*inputs, chunk=64)[1]
    torch.testing.assert_close(out.double(), exact, atol=5e-5, rtol=0)
    grads = torch.autograd.grad(out.sum(), [x for x in inputs if x is not None])
    assert all(x.isfinite().all() for x in grads)


def test_no_chunk_spans_a_whole_short_sequence():
    """One chunk of 64 tokens made the causal form at length 64 twice as expensive as exact attention."""
    assert [chunk_length(n) for n in (1, 17, 64, 100, 256, 4096)] == [16, 16, 16, 25, 64, 64]


class Elements(TorchDispatchMode):
    """How many elements all operations returned."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


def test_the_backward_pass_makes_no_tensor_of_full_length_for_each_chunk():
    """The gradient of a slice taken in a loop is as long as the sequence: n/c of them made the pass quadratic."""
    made = []
    for length in (512, 1024):
        out = chunked_scan(*draw(length, decay=False, delta=False, start=False)[:3], chunk=16)[1]
        with Elements() as elements:
            out.sum().backward()
        made.append(elements.total)
    assert made[1] <= 2.2 * made[0]
