"""Contract properties of what an operator declares: its limit, bound, order and expectation."""

import inspect
import math
from collections.abc import Callable

import torch

from attnlens.attention.base import AbstractAttention
from attnlens.testing.inputs import EXACT, LENGTHS, assert_close, dimensions, gaussian, modes

Factory = Callable[..., AbstractAttention]

ORDER_BUDGETS = (32, 64, 128, 256)
ORDER_DRAWS = 60
KERNEL_DRAWS = 400


def declarations(factory: Factory) -> str | None:
    """What is declared on the class is present and of the right kind."""
    operator = factory(**dimensions())
    cls = type(operator)
    assert isinstance(getattr(cls, "family", None), str), f"`family` is not declared on {cls.__name__}"
    assert cls.family, f"`family` of {cls.__name__} is empty"
    arguments = inspect.signature(cls).parameters
    assert cls.budget is None or cls.budget in arguments, f"`budget`={cls.budget!r} is no argument of {cls.__name__}"
    assert 0 < cls.bound_probability <= 1, f"`bound_probability` is {cls.bound_probability}"
    assert cls.order is None or cls.budget is not None, "`order` needs a `budget` to be an order in"
    assert (cls.__doc__ or "") != (AbstractAttention.__doc__ or ""), f"{cls.__name__} has no docstring"
    return None


def exact_limit(factory: Factory) -> str | None:
    """At `exact_at(length)` the operator equals its target, causal and padded too."""
    if factory(**dimensions()).exact_at(5) is None:
        return "no exact limit declared"
    for length in LENGTHS:
        limit = type(factory(**dimensions())).exact_at(length)
        operator = factory(**dimensions(), **(limit or {})).double()
        q, k, v = gaussian(length, arity=operator.arity)
        mask = torch.arange(length) < torch.tensor([length, max(1, length // 2)])[:, None]
        for is_causal in modes(operator.causal):
            for padding in (None, mask):
                rows = slice(None) if padding is None else mask[:, None].expand(*q.shape[:3])
                out = operator(q, k, v, causal=is_causal, key_padding_mask=padding)
                exact = operator.reference(q, k, v, causal=is_causal, key_padding_mask=padding)
                case = f"exact limit {limit} at length {length}, causal={is_causal}, padded={padding is not None}"
                assert_close(out[rows], exact[rows], EXACT, case)
    return None


def error_bound(factory: Factory) -> str | None:
    """Every output row lies within the declared bound at logit scales 0.1, 1 and 3."""
    plain = factory(**dimensions()).double()
    q, k, v = gaussian(5, arity=plain.arity)
    if plain.error_bound(q, k, v) is None:
        return "no error bound declared"
    inside, total = 0, 0
    for scale in (0.1, 1.0, 3.0):
        for draw in range(4):
            operator = factory(**dimensions(seed=draw)).double()
            q, k, v = gaussian(40, arity=operator.arity, logit_scale=scale, seed=draw)
            for is_causal in modes(operator.causal):
                bound = operator.error_bound(q, k, v, causal=is_causal)
                assert bound is not None, f"no bound at logit scale {scale}"
                exact = operator.reference(q, k, v, causal=is_causal)
                error = (operator(q, k, v, causal=is_causal) - exact).norm(dim=-1)
                inside += int((error <= bound * (1 + EXACT) + EXACT * 1e-4).sum())
                total += error.numel()
    share, promised = inside / total, type(factory(**dimensions())).bound_probability
    assert share >= promised, f"the bound holds for {share:.4f} of the rows, declared {promised}"
    return None


def order(factory: Factory) -> str | None:
    """The log-log slope of the root mean square error over draws against the budget is -order within 0.1."""
    cls = type(factory(**dimensions()))
    if cls.order is None or cls.budget is None:
        return "no order declared"
    q, k, v = gaussian(24, arity=cls.arity, logit_scale=0.1)
    errors = []
    for budget in ORDER_BUDGETS:
        draws = [factory(**dimensions(seed=draw), **{cls.budget: budget}).double() for draw in range(ORDER_DRAWS)]
        exact = draws[0].reference(q, k, v)
        errors.append(math.sqrt(sum((op(q, k, v) - exact).square().sum().item() for op in draws) / ORDER_DRAWS))
    slope = log_log_slope(ORDER_BUDGETS, errors)
    assert abs(slope + cls.order) <= 0.1, f"slope {slope:.3f} at logit scale 0.1, declared order {cls.order}"
    return None


def log_log_slope(x: tuple[int, ...], y: list[float]) -> float:
    """Least-squares slope of log y against log x; exactly zero errors count as round-off."""
    log_x = torch.tensor(x, dtype=torch.float64).log()
    log_y = torch.tensor(y, dtype=torch.float64).clamp_min(1e-300).log()
    centered = log_x - log_x.mean()
    return ((centered * log_y).sum() / centered.square().sum()).item()


def unbiased(factory: Factory) -> str | None:
    """The mean of the kernel estimate over draws lies within five standard errors of its target, entry by entry."""
    operator = factory(**dimensions())
    if not operator.unbiased:
        return "not declared unbiased"
    q, k, _ = gaussian(6, batch=1, logit_scale=0.5)
    draws = torch.stack([factory(**dimensions(seed=draw)).double().kernel(q, k) for draw in range(KERNEL_DRAWS)])
    error = (draws.mean(0) - operator.kernel_target(q, k)).abs()
    allowed = 5 * draws.std(0) / KERNEL_DRAWS**0.5 + EXACT
    assert (error <= allowed).all(), f"the mean over draws is off by {(error / allowed).max() * 5:.1f} standard errors"
    return None
