"""Causal attention with a running matrix state, by chunks: linear attention, scalar decay, and the delta rule.

For log decays g_i <= 0 and step sizes 0 <= beta_i <= 1,

    S_i = e^{g_i} S_{i-1} + k_i u_i^T,   u_i = beta_i (v_i - e^{g_i} S_{i-1}^T k_i),   out_i = S_i^T q_i;

without `beta` the value itself is written, u_i = v_i, and without `log_decay` nothing is forgotten. Within a chunk of c
tokens let L_i = g_1 + ... + g_i, D_ij = e^{L_i - L_j} for j <= i, 0 above, and S the state before the chunk. Then

    (I + A) U = diag(beta) V - diag(beta e^L) K S,   A = tril(diag(beta) K K^T . D, -1),
    out = (Q K^T . D) U + diag(e^L) Q S,
    S' = e^{L_c} S + K^T diag(e^{L_c - L}) U,

time O(n c (d + dv) + n d dv), memory O(n d dv / c) for the states that the backward pass reads. Every exponent is <= 0.
One running state beats all states at once on a CPU, since it stays in cache.

The backward pass is written out. With dr = (I + A)^{-T} dU it needs the same products, and the decays none of their
own, because L_i scales whole rows by e^{L_i} and e^{-L_i}:

    dL_i = <dout_i, out_i> + <dr_i, u_i - beta_i v_i> - <dw_i, k_i>,   dL_c += <dS', S'>,

where dw_i is the gradient of k_i as a key that is written and compared with, not of k_i as the one that compares.

Sources: "Gated Linear Attention Transformers with Hardware-Efficient Training" (Yang et al., 2024),
https://arxiv.org/abs/2312.06635; "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (Yang et
al., 2024), https://arxiv.org/abs/2406.06484; "Gated Delta Networks" (Yang et al., 2025),
https://arxiv.org/abs/2412.06464.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SHORTEST, LONGEST = 16, 64
# With a triangular system, which is solved at a fifth of the rate of a product, shorter chunks pay.
LONGEST_SOLVED = 48


def chunk_length(length: int) -> int:
    """Tokens of a chunk: a quarter of the sequence, between 16 and 64.

    One chunk over a short sequence would form the whole masked matrix and cost as much as exact attention; chunks below
    16 cost more in calls than they save in products.
    """
    return max(SHORTEST, min(LONGEST, -(-length // 4)))


class ScanState(NamedTuple):
    """What the tokens so far have written: S of the module docstring."""

    memory: Float[Tensor, "b h d dv"]


def empty_state(batch: int, num_heads: int, head_dim: int, value_dim: int, like: Tensor) -> ScanState:
    """Nothing written yet, on the device of `like` and in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return ScanState(torch.zeros(batch, num_heads, head_dim, value_dim, dtype=dtype, device=like.device))


def chunked_scan(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    *,
    log_decay: Float[Tensor, "b h n"] | None = None,
    beta: Float[Tensor, "b h n"] | None = None,
    state: Float[Tensor, "b h d dv"] | None = None,
    final_state: bool = False,
    chunk: int | None = None,
    unit: bool = False,
) -> tuple[Float[Tensor, "b h d dv"] | None, Float[Tensor, "b h n dv"]]:
    """The recurrence of the module docstring from `state` (None: zero) on; the state after the last token where
    `final_state` asks for it. Decays should have passed attnlens.linalg.decay.bounded_decay. With `unit`, q and k are
    scaled to unit length, chunk by chunk, so that no scaled copy of them is made."""
    if chunk is None:
        chunk = min(chunk_length(q.shape[2]), LONGEST if beta is None else LONGEST_SOLVED)
    # One batch axis: with two, every product pays for expanding and reshaping them.
    flat = [x if x is None else x.flatten(0, 1) for x in (q, k, v, log_decay, beta, state)]
    out, last = _Scan.apply(*flat, chunk, final_state, unit)
    return last.unflatten(0, q.shape[:2]) if final_state else None, out.unflatten(0, q.shape[:2])


class _Chunk(NamedTuple):
    """What one chunk multiplies its values and its state with; None stands for ones."""

    scores: Tensor  # Q K^T . D
    steps: Tensor | None  # diag(beta) K
    decay: Tensor | None  # D
    from_start: Tensor | None  # e^L
    to_end: Tensor | None  # e^{L_c - L}

    def kept(self, state: Tensor) -> Tensor:
        return state if self.from_start is None else state * self.from_start[..., -1:, :]

    def masked(self, products: Tensor) -> Tensor:
        return products.tril_() if self.decay is None else products.mul_(self.decay)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _chunk(q: Tensor, k: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> _Chunk:
    steps = None if beta is None else k * beta[..., None]
    if log_decay is None:
        return _Chunk((q @ k.mT).tril_(), steps, None, None, None)
    total = log_decay.cumsum(-1)
    # Cut before the exponential too: above the diagonal exponents are positive and may overflow.
    decay = (total[..., :, None] - total[..., None, :]).tril_().exp_().tril_()
    return _Chunk(
        (q @ k.mT).mul_(decay), steps, decay, total.exp()[..., None], (total[..., -1:] - total).exp_()[..., None]
    )


def _solve(c: _Chunk, k: Tensor, right: Tensor, *, adjoint: bool = False) -> Tensor:
    """(I + A)^{-1} right, or (I + A)^{-T} right: only one triangle is read, and not the diagonal."""
    assert c.steps is not None
    system = _times(c.steps @ k.mT, c.decay)
    # X^T (I + A)^T = right^T: transposed, the rows of X lie as BLAS wants its columns, and nothing is copied.
    factor = system if adjoint else system.mT
    return torch.linalg.solve_triangular(factor, right.mT, upper=not adjoint, left=False, unitriangular=True).mT


def _product(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    """left @ right + added, by one kernel."""
    return torch.bmm(left, right) if added is None else torch.baddbmm(added, left, right)


def _split(chunk: int, *tensors: Tensor | None) -> list[tuple[Any, ...]]:
    length = next(x.shape[1] for x in tensors if x is not None)
    parts = [[None] * -(-length // chunk) if x is None else x.split(chunk, 1) for x in tensors]
    return list(zip(*parts, strict=True))


def _forward(
    chunks: list[tuple[Any, ...]], state: Tensor | None, final_state: bool, saved: bool, unit: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """(out, U, the state before every chunk and the last one where asked for); U is None where it is V.

    Where nothing is `saved` for a backward pass, U and the states before the last are not kept.
    """
    states: list[Tensor | None] = [state]
    outs, written = [], []
    for index, (q, k, v, log_decay, beta) in enumerate(chunks):
        if unit:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        c, past, u = _chunk(q, k, log_decay, beta), states[-1], v
        if c.steps is not None:
            right = v * beta[..., None]
            if past is not None:
                right = torch.baddbmm(right, _times(c.steps, c.from_start), past, alpha=-1)
            u = _solve(c, k, right)
            if saved:
                written.append(u)
        outs.append(_product(c.scores, u, None if past is None else torch.bmm(_times(q, c.from_start), past)))
        if final_state or index < len(chunks) - 1:
            after = _product(_times(k, c.to_end).mT, u, None if past is None else c.kept(past))
            states = [*states, after] if saved else [after]
    return torch.cat(outs, 1), torch.cat(written, 1) if written else None, states


class _Adjoint(NamedTuple):
    """Gradients of one chunk; `past` is that of the state before it."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    past: Tensor


def _backward_chunk(
    inputs: tuple[Any, ...], past: Tensor | None, after: Tensor | None, grad_out: Tensor, grad_after: Tensor | None
) -> _Adjoint:
    """Gradients from those of the chunk's outputs and of the state `after` it (None: that state is not read)."""
    q, k, v, log_decay, beta, u, out = inputs
    c = _chunk(q, k, log_decay, beta)
    grad_u = torch.bmm(c.scores.mT, grad_out)
    kept = None if grad_after is None else c.kept(grad_after)
    grad_past = _product(_times(q, c.from_start).mT, grad_out, kept)
    grad_scores = c.masked(torch.bmm(grad_out, u.mT))
    grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q)
    if grad_after is not None:
        grad_u.baddbmm_(_times(k, c.to_end), grad_after)
        grad_k.baddbmm_(_times(u, c.to_end), grad_after.mT)
    if past is not None:
        grad_q.baddbmm_(_times(grad_out, c.from_start), past.mT)
    grad_steps = grad_right = grad_beta = None
    if c.steps is not None:
        grad_right = _solve(c, k, grad_u, adjoint=True)
        grad_system = c.masked(torch.bmm(grad_right, u.mT)).tril_(-1)
        grad_steps = torch.bmm(grad_system, k)
        grad_k.baddbmm_(grad_system.mT, c.steps, alpha=-1)
        if past is not None:
            grad_steps.baddbmm_(_times(grad_right, c.from_start), past.mT)
            grad_past.baddbmm_(_times(c.steps, c.from_start).mT, grad_right, alpha=-1)
    grad_decay = None
    if log_decay is not None:
        grad_total = (grad_out * out).sum(-1) - (grad_k * k).sum(-1)
        if grad_right is not None:
            grad_total += (grad_right * (u - v * beta[..., None])).sum(-1)
        if grad_after is not None:
            assert after is not None, "a state has a gradient only where it was saved"
            grad_total[..., -1] += (grad_after * after).sum((-2, -1))
        grad_decay = grad_total.flip(-1).cumsum(-1).flip(-1)
    if grad_steps is None or grad_right is None:
        return _Adjoint(grad_q, grad_k, grad_u, grad_decay, None, grad_past)
    grad_beta = (grad_right * v).sum(-1) - (grad_steps * k).sum(-1)
    grad_k -= grad_steps * beta[..., None]
    return _Adjoint(grad_q, grad_k, grad_right * beta[..., None], grad_decay, grad_beta, grad_past)


def _unit_backward_chunk(
    inputs: tuple[Any, ...], past: Tensor | None, after: Tensor | None, grad_out: Tensor, grad_after: Tensor | None
) -> _Adjoint:
    """The same where q and k were scaled to unit length."""
    q, k, *rest = inputs
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    found = _backward_chunk((unit_q, unit_k, *rest), past, after, grad_out, grad_after)
    return found._replace(q=_through_unit(found.q, q, unit_q), k=_through_unit(found.k, k, unit_k))


def _through_unit(grad: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    """The gradient of x from that of x / |x|."""
    along = torch.linalg.vecdot(grad, unit)[..., None]
    return torch.addcmul(grad, unit, along, value=-1) / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


class _Scan(torch.autograd.Function):
    """`chunked_scan` with the backward pass of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor | None,
        chunk: int,
        final_state: bool,
        unit: bool,
    ) -> tuple[Tensor, Tensor]:
        saved = any(ctx.needs_input_grad)
        out, written, states = _forward(_split(chunk, q, k, v, log_decay, beta), state, final_state, saved, unit)
        ctx.chunk, ctx.final_state, ctx.unit = chunk, final_state, unit
        ctx.save_for_backward(q, k, v, log_decay, beta, written, out, *states)
        last = states[-1] if final_state else None
        return out, q.new_empty(0) if last is None else last

    @staticmethod
    @once_differentiable  # its wrapper hides the names of the arguments from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_out, grad_last = grad_outputs
        q, k, v, log_decay, beta, written, out, *states = ctx.saved_tensors
        # Views by `split`, never by slices in a loop: the gradient of a slice is a tensor of full length.
        chunks = _split(ctx.chunk, q, k, v, log_decay, beta, v if written is None else written, out)
        states = [*states, None]
        carried = grad_last if ctx.final_state else None
        adjoints = []
        for index in reversed(range(len(chunks))):
            grads = grad_out.split(ctx.chunk, 1)[index]
            adjoint = _unit_backward_chunk if ctx.unit else _backward_chunk
            adjoints.append(adjoint(chunks[index], states[index], states[index + 1], grads, carried))
            carried = adjoints[-1].past
        q_, k_, v_, decay_, beta_, _ = (
            None if parts[0] is None else torch.cat(parts[::-1], 1) for parts in zip(*adjoints, strict=True)
        )
        return q_, k_, v_, decay_, beta_, carried if states[0] is not None else None, None, None, None
