"""Contract properties of how an operator runs: on any device, repeatably, under the compiler."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnlens.attention.base import AbstractAttention
from attnlens.testing.inputs import SINGLE, assert_close, dimensions, gaussian, modes

Factory = Callable[..., AbstractAttention]


class _NothingOnTheHost(TorchDispatchMode):
    """Fails as soon as an operation returns a tensor that is not on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            on_host = isinstance(leaf, Tensor) and leaf.device.type != "meta"
            assert not on_host, f"{func} made a tensor on {leaf.device}: create it on the device of the inputs"
        return result


def device_independence(factory: Factory) -> str | None:
    """The operator runs on the meta device and makes nothing elsewhere, or names the step that cannot."""
    operator = factory(**dimensions())
    if operator.host_step is not None:
        return f"data-dependent step: {operator.host_step}"
    operator = operator.to("meta")
    q, k, v = (x.to("meta") for x in gaussian(70, arity=operator.arity, dtype=torch.float32))
    mask = torch.ones(2, 70, dtype=torch.bool, device="meta")
    for is_causal in modes(operator.causal):
        for padding in (None, mask):
            try:
                with _NothingOnTheHost():
                    out = operator(q, k, v, causal=is_causal, key_padding_mask=padding)
            except (RuntimeError, NotImplementedError) as error:
                raise AssertionError(f"does not run on the meta device: {error}") from error
            assert out.is_meta
            assert out.shape == q.shape, f"shape {tuple(out.shape)} on the meta device"
    return None


def repeatability(factory: Factory) -> str | None:
    """Equal config and seed give equal results; so do a copy, a second call and a reloaded state."""
    operator = factory(**dimensions(seed=3))
    q, k, v = gaussian(40, arity=operator.arity, dtype=torch.float32)
    first = operator(q, k, v)
    assert torch.equal(first, operator(q, k, v)), "two calls differ: draw at construction, into a buffer"
    assert torch.equal(first, factory(**dimensions(seed=3))(q, k, v)), "two operators of one seed differ"
    assert torch.equal(first, copy.deepcopy(operator)(q, k, v)), "a deep copy differs"
    other = factory(**dimensions(seed=4))
    other.load_state_dict(operator.state_dict())
    assert torch.equal(first, other(q, k, v)), "a draw is missing from the state: register it as a buffer"
    return None


def compilation(factory: Factory) -> str | None:
    """`torch.compile` takes the operator as one graph, and the graph computes the same; or the reason is declared."""
    operator = factory(**dimensions())
    if operator.graph_break is not None:
        return f"graph break: {operator.graph_break}"
    q, k, v = gaussian(20, arity=operator.arity, dtype=torch.float32)
    for is_causal in modes(operator.causal):
        torch._dynamo.reset()
        compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
        try:
            found = compiled(q, k, v, causal=is_causal)
        except Exception as error:  # any failure inside the compiler is the finding
            raise AssertionError(f"does not compile as one graph, causal={is_causal}: {error}") from error
        assert_close(found, operator(q, k, v, causal=is_causal), SINGLE, "the compiled graph")
    return None
