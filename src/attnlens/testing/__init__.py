"""The public contract: `check_attention(factory)` holds an operator to what it declares.

    from functools import partial
    from attnlens.attention import build
    from attnlens.testing import check_attention

    check_attention(partial(build, {"_target_": "my_package.MyAttention"}))

`factory` is called as `factory(head_dim=..., num_heads=..., max_length=..., seed=..., **overrides)`. Each property is
one function of `CONTRACT`; it raises AssertionError with the finding, or returns why it does not apply, or None.
"""

from collections.abc import Callable

from attnlens.attention.base import AbstractAttention
from attnlens.testing import behavior, machine, theory

Factory = Callable[..., AbstractAttention]

CONTRACT: dict[str, Callable[[Factory], str | None]] = {
    "declarations": theory.declarations,
    "shapes": behavior.shapes,
    "examples_do_not_mix": behavior.examples_do_not_mix,
    "causal": behavior.causal,
    "padding_is_never_read": behavior.padding_is_never_read,
    "gradients": behavior.gradients,
    "nan_query_stays_in_its_row": behavior.nan_query_stays_in_its_row,
    "constant_values": behavior.constant_values,
    "exact_limit": theory.exact_limit,
    "recurrence": behavior.recurrence,
    "error_bound": theory.error_bound,
    "order": theory.order,
    "unbiased": theory.unbiased,
    "device_independence": machine.device_independence,
    "repeatability": machine.repeatability,
    "compilation": machine.compilation,
}


def check_attention(factory: Factory) -> dict[str, str]:
    """Hold an operator to every row of the contract.

    Returns:
        For each property "passed", or the reason for which it does not apply.

    Raises:
        AssertionError: the first property that fails, with what was found.
    """
    return {name: check(factory) or "passed" for name, check in CONTRACT.items()}
