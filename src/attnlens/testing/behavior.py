"""Contract properties of what an operator computes: shapes, independence, causality, padding, gradients, recurrence."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from attnlens.attention.base import AbstractAttention, AbstractRecurrentAttention
from attnlens.testing.inputs import EXACT, HEADS, LENGTHS, SINGLE, assert_close, dimensions, gaussian, modes

Factory = Callable[..., AbstractAttention]


def shapes(factory: Factory) -> str | None:
    """Shape, dtype and finiteness at every length, in three precisions, also with values wider than queries."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        operator = factory(**dimensions()).to(dtype if dtype != torch.bfloat16 else torch.float32)
        for length in LENGTHS:
            for value_dim in (8, 5):
                q, k, v = gaussian(length, value_dim=value_dim, arity=operator.arity, dtype=dtype)
                for is_causal in modes(operator.causal):
                    out = operator(q, k, v, causal=is_causal)
                    case = f"length {length}, {dtype}, causal={is_causal}"
                    assert out.shape == (*q.shape[:3], value_dim), f"{case}: shape {tuple(out.shape)}"
                    assert out.dtype == dtype, f"{case}: returned {out.dtype}"
                    assert out.isfinite().all(), f"{case}: not finite"
    return None


def examples_do_not_mix(factory: Factory) -> str | None:
    """An example's result does not change with what else is in its batch."""
    operator = factory(**dimensions()).double()
    for length in (5, 70):
        q, k, v = gaussian(length, arity=operator.arity)
        louder = [torch.cat([x[:1], 30 * x[1:]]) for x in (q, k, v)]
        for is_causal in modes(operator.causal):
            together = operator(*louder, causal=is_causal)[:1]
            alone = operator(q[:1], k[:1], v[:1], causal=is_causal)
            assert_close(together, alone, EXACT, f"an example beside a louder one, length {length}")
    return None


def causal(factory: Factory) -> str | None:
    """Changing everything after t changes nothing up to t; an operator that cannot be causal says so."""
    operator = factory(**dimensions()).double()
    q, k, v = gaussian(70, arity=operator.arity)
    if not operator.causal:
        try:
            operator(q, k, v, causal=True)
        except ValueError:
            return "declared not causal, and refuses"
        raise AssertionError("declared not causal, but accepts causal=True")
    before = operator(q, k, v, causal=True)
    for t in (0, 1, 20, 33, 63, 68):
        others = gaussian(70, arity=operator.arity, logit_scale=9.0, seed=1 + t)
        changed = [torch.cat([x[:, :, : t + 1], y[:, :, t + 1 :]], 2) for x, y in zip((q, k, v), others, strict=True)]
        after = operator(*changed, causal=True)
        assert_close(
            after[:, :, : t + 1], before[:, :, : t + 1], EXACT, f"outputs up to {t} after a change of the future"
        )
    return None


def padding_is_never_read(factory: Factory) -> str | None:
    """With padding full of NaN every example equals its unpadded run; an example without real tokens gives zero."""
    operator = factory(**dimensions()).double()
    for lengths in ((5, 3), (70, 64), (64, 1)):
        q, k, v = gaussian(max(lengths), arity=operator.arity)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        poisoned = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v)]
        for is_causal in modes(operator.causal):
            padded = operator(*poisoned, causal=is_causal, key_padding_mask=mask)
            for row, real in enumerate(lengths):
                short = [x[row : row + 1, :, :real] for x in (q, k, v)]
                case = f"real length {real} of {max(lengths)}, causal={is_causal}"
                assert_close(padded[row : row + 1, :, :real], operator(*short, causal=is_causal), EXACT, case)
    q, k, v = gaussian(5, arity=operator.arity)
    empty = torch.zeros(2, 5, dtype=torch.bool)
    out = operator(q, k, v, key_padding_mask=empty)
    assert (out == 0).all(), "an example without real tokens must give zeros"
    return None


def gradients(factory: Factory) -> str | None:
    """Analytic gradients equal finite differences, and stay finite with a masked tail."""
    operator = factory(**dimensions(head_dim=4)).double()
    for is_causal in modes(operator.causal):

        def run(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = is_causal) -> Tensor:
            return operator(q, k, v, causal=is_causal)

        inputs = [x.requires_grad_() for x in gaussian(6, batch=1, head_dim=4, arity=operator.arity)]
        try:
            agrees = gradcheck(run, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)
        except GradcheckError as error:
            raise AssertionError(f"gradcheck, causal={is_causal}: {error}") from error
        assert agrees
        inputs = [x.requires_grad_() for x in gaussian(9, arity=operator.arity)]
        mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
        wide = factory(**dimensions()).double()
        wide(*inputs, causal=is_causal, key_padding_mask=mask)[mask[:, None].expand(-1, HEADS, -1)].sum().backward()
        finite = all(x.grad is None or bool(x.grad.isfinite().all()) for x in inputs)
        assert finite, f"gradients are not finite with a masked tail, causal={is_causal}"
    return None


def nan_query_stays_in_its_row(factory: Factory) -> str | None:
    """A NaN in one query gives NaN in its own output row and nowhere else."""
    operator = factory(**dimensions()).double()
    if not operator.rows_independent:
        return "rows are declared dependent on each other"
    q, k, v = gaussian(20, arity=operator.arity)
    q[0, 1, 7] = torch.nan
    for is_causal in modes(operator.causal):
        bad = operator(q, k, v, causal=is_causal).isnan().any(-1)
        assert bad[0, 1, 7], f"a NaN query gives a healthy row, causal={is_causal}"
        assert bad.sum() == 1, f"a NaN query spoils {int(bad.sum()) - 1} other rows, causal={is_causal}"
    return None


def constant_values(factory: Factory) -> str | None:
    """Constant values in, the same constant out, and no negative weight, where rows are declared stochastic."""
    operator = factory(**dimensions()).double()
    if not operator.row_stochastic:
        return "rows are not declared stochastic"
    for length in (1, 5, 70):
        q, k, _ = gaussian(length, arity=operator.arity, logit_scale=3.0)
        for is_causal in modes(operator.causal):
            weights = operator.matrix(q, k, causal=is_causal)
            assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), EXACT, f"row sums at length {length}")
            assert weights.min() >= -EXACT, f"a weight of {weights.min():.1e} at length {length}"
    return None


def recurrence(factory: Factory) -> str | None:
    """Token by token = one causal run; split and resumed = one run; `step` leaves its argument as it was."""
    operator = factory(**dimensions()).double()
    if not isinstance(operator, AbstractRecurrentAttention):
        return "no recurrent form declared"
    q, k, v = gaussian(70, value_dim=5, arity=operator.arity)
    whole = operator(q, k, v, causal=True)
    for cuts in ((*range(1, 70),), (33,), (1, 64)):
        state = operator.init_state(2, HEADS, 8, 5, q)
        outs = []
        for start, stop in zip((0, *cuts), (*cuts, 70), strict=True):
            part = slice(start, stop)
            kept = [x.clone() for x in state]
            new, out = operator.step(state, q[:, :, part], k[:, :, part], v[:, :, part])
            unchanged = all(torch.equal(x, y) for x, y in zip(state, kept, strict=True))
            assert unchanged, "`step` changed the state it was given"
            state, outs = new, [*outs, out]
        assert_close(torch.cat(outs, 2), whole, EXACT, f"{len(cuts) + 1} steps against one causal run")
    single = factory(**dimensions())
    assert isinstance(single, AbstractRecurrentAttention)
    q, k, v = (x.float() for x in (q, k, v))
    _, out = single.step(single.init_state(2, HEADS, 8, 5, q), q, k, v)
    assert_close(out, single(q, k, v, causal=True), SINGLE, "one step over all tokens in float32")
    return None
