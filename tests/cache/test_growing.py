"""Growing: rows appended in place, and yet a value."""

import pytest
import torch
from torch.utils import _pytree as pytree

from attnlens.cache.growing import Growing


@pytest.fixture
def rows():
    return torch.arange(24.0).reshape(1, 12, 2)


def test_rows_arrive_in_order(rows):
    value = Growing.empty(1, 2, like=rows)
    for part in rows.split([1, 4, 2, 5], dim=1):
        value = value.append(part)
    assert torch.equal(value.tensor, rows)


def test_two_continuations_of_one_prefix_do_not_meet(rows):
    prefix = Growing.empty(1, 2, like=rows, capacity=12).append(rows[:, :4])
    first, second = prefix.append(rows[:, 4:8]), prefix.append(-rows[:, 4:9])
    third = first.append(rows[:, 8:])
    assert torch.equal(prefix.tensor, rows[:, :4])
    assert torch.equal(third.tensor, rows)
    assert torch.equal(second.tensor[:, 4:], -rows[:, 4:9])


def test_appends_are_in_place_while_there_is_room(rows):
    """The buffer is copied a logarithmic number of times, not at every append."""
    value, buffers = Growing.empty(1, 2, like=rows), set()
    for _ in range(500):
        value = value.append(rows[:, :1])
        buffers.add(value.buffer.data.data_ptr())
        keep = value.buffer  # noqa: F841 - an address is not reused while its owner lives
    assert len(buffers) <= 12
    assert value.tensor.shape == (1, 500, 2)


def test_gradients_pass_through(rows):
    leaf = rows.clone().requires_grad_()
    value = Growing.empty(1, 2, like=rows)
    for part in leaf.split(3, dim=1):
        value = value.append(part)
    (value.tensor * rows).sum().backward()
    assert torch.equal(leaf.grad, rows)


def test_its_rows_are_leaves_of_a_tree(rows):
    value = Growing.of(rows)
    doubled = pytree.tree_map_only(torch.Tensor, lambda leaf: 2 * leaf, (value, 3))
    assert torch.equal(doubled[0].tensor, 2 * rows)
    assert doubled[1] == 3
