"""Blocks, balanced groups and tiles against loops over single tokens."""

import pytest
import torch

from attnlens.linalg.blocks import (
    balanced_groups,
    fold,
    in_pieces,
    inverse,
    real_first,
    scores_at_once,
    take_rows,
    tiles,
    unfold,
)


@pytest.mark.parametrize("length", [1, 4, 7, 8, 9])
def test_unfold_inverts_fold(length):
    x = torch.randn(2, 3, length, 5, dtype=torch.float64)
    blocks = fold(x, 4)
    assert blocks.shape == (6, -(-length // 4), 4, 5)
    assert torch.equal(unfold(blocks, 3, length), x)
    assert blocks.flatten(1, 2)[:, length:].eq(0).all()


def test_take_rows_equals_indexing_and_sums_gradients_of_repeated_rows():
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    index = torch.randint(6, (2, 3, 2, 5))
    found = take_rows(x, index)
    for b in range(2):
        for h in range(3):
            assert torch.equal(found[b, h], x[b, h][index[b, h]])
    (gradient,) = torch.autograd.grad(found.sum(), x)
    count = torch.nn.functional.one_hot(index.flatten(2), 6).sum(2)
    assert torch.equal(gradient, count[..., None].expand_as(x).double())


def test_inverse_of_an_order_is_the_rank():
    order = torch.stack([torch.randperm(9) for _ in range(4)])
    assert torch.equal(order.gather(-1, inverse(order)), torch.arange(9).expand(4, 9))


def test_padding_comes_last_even_behind_a_nan():
    """A NaN key sorted behind keys of padding would push a real token out of every group."""
    key = torch.tensor([[[3.0, torch.nan, 1.0, 0.0, 2.0]]])
    mask = torch.tensor([[True, True, True, False, False]])
    assert real_first(key, mask).tolist() == [[[2, 0, 1, 3, 4]]]


@pytest.mark.parametrize("real", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("size", [1, 3, 4, 13, 20])
def test_groups_are_balanced_ordered_and_free_of_padding(real, size):
    torch.manual_seed(real)
    key = torch.randn(2, 3, 13)
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[0, torch.randperm(13)[:real]] = True
    mask[1] = True
    groups = balanced_groups(key, size, mask)
    for b in range(2):
        count = int(mask[b].sum())
        used = -(-count // size)
        for h in range(3):
            filled = groups.filled[b, h]
            sizes = filled.sum(-1)
            assert sizes[:used].max() - sizes[:used].min() <= 1
            assert sizes.max() <= size
            assert (sizes > 0).sum() == used
            members = groups.members[b, h][filled]
            assert sorted(members.tolist()) == mask[b].nonzero()[:, 0].tolist()
            assert (key[b, h, members].diff() >= 0).all()
            slots = groups.place[b, h][mask[b]]
            assert torch.equal(groups.members[b, h].flatten()[slots], mask[b].nonzero()[:, 0])
            assert filled.flatten()[slots].all()


@pytest.mark.parametrize("length", [1, 5, 12, 13])
@pytest.mark.parametrize("size", [1, 4, 20])
def test_groups_of_a_padded_run_are_those_of_the_short_run(length, size):
    key = torch.randn(1, 2, 17)
    mask = torch.arange(17)[None] < length
    short, padded = balanced_groups(key[..., :length], size, None), balanced_groups(key, size, mask)
    of_short = short.place // short.members.shape[-1]
    of_padded = padded.place[..., :length] // padded.members.shape[-1]
    assert torch.equal(of_short, of_padded)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_blocks", [1, 4])
def test_tiles_hold_every_row_once_with_rows_of_its_own_block(size, num_blocks):
    torch.manual_seed(size)
    even, crowded = torch.randint(num_blocks, (2, 3, 11)), torch.zeros(2, 3, 11, dtype=torch.long)
    for block in (even, crowded):
        cut = tiles(block, num_blocks, size)
        assert torch.equal(cut.members.flatten(-2).gather(-1, cut.place), torch.arange(11).expand(2, 3, 11))
        assert torch.equal(cut.block.gather(-1, cut.place // size), block)
        assert (cut.place.sort(-1).values.diff() > 0).all()


def test_pieces_give_what_the_whole_gives_forward_and_backward():
    x = torch.randn(2, 2, 9000, 8, dtype=torch.float64, requires_grad=True)
    whole = x.square().cumsum(-1)
    parts = in_pieces(lambda rows: rows.square().cumsum(-1), x)
    assert torch.equal(parts, whole)
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    assert torch.equal(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (whole, parts)))


def test_pieces_are_small_where_the_input_is_large():
    sizes = []
    in_pieces(lambda rows: sizes.append(rows.shape[2]) or rows, torch.zeros(1, 8, 1000, 64))
    assert sum(sizes) == 1000
    assert max(sizes) * 8 * 64 <= scores_at_once(torch.zeros(1)) // 16
