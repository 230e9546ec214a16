"""Weights as equal slices, and what is made of them."""

from functools import partial

import pytest
import torch

from attnlens.conversion.extreme import extreme, separate, shared_bases, shared_cores
from attnlens.conversion.slices import slices, with_slices
from attnlens.conversion.trawl import cp, trawl
from tests.conversion.models import HEADS, WIDTH, decoder, encoder, ids


@pytest.mark.parametrize(("model", "shape"), [(encoder(), (2, 12, 24, 24)), (decoder(), (2, 18, 24, 12))])
def test_slices_are_all_of_the_weights_and_go_back(model, shape):
    stack, size = slices(model)
    assert stack.shape == shape
    assert size == shape[-1]
    projection = model.layers[1].projection
    torch.testing.assert_close(stack[1, 0], projection.inputs[0].weight.T[:, :size])
    assert torch.equal(with_slices(model, stack)(ids()), model(ids()))
    changed = with_slices(model, torch.zeros_like(stack))
    assert all((m.weight == 0).all() for m in changed.layers[0].mlp.modules() if hasattr(m, "weight"))


@pytest.mark.parametrize(
    "cut", [partial(separate, rank=24), partial(shared_bases, rank=24), partial(shared_cores, rank=24, cores=24)]
)
def test_full_ranks_are_exact(cut):
    model = encoder()
    torch.testing.assert_close(extreme(model, cut).model(ids()), model(ids()), rtol=1e-8, atol=1e-9)


def test_each_level_keeps_less_and_errs_more():
    """Of three approximations of one rank each is a case of the one before."""
    x = slices(encoder()).stack.flatten(0, 1)
    cuts = [separate(x, 6), shared_bases(x, 6), shared_cores(x, 6, 4)]
    errors, sizes = zip(*(((whole - x).norm().item(), kept) for whole, kept in cuts), strict=True)
    assert list(errors) == sorted(errors)
    assert list(sizes) == [24 * 6 * 48, 2 * 24 * 6 + 24 * 36, 2 * 24 * 6 + 4 * 36 + 24 * 4]
    tails = [torch.linalg.svdvals(matrix)[6:].square().sum() for matrix in x]
    assert errors[0] == pytest.approx(torch.stack(tails).sum().sqrt().item())


@pytest.mark.parametrize(("kind", "order"), [("tucker", 3), ("tucker", 4), ("tucker", 5), ("cp", 3), ("cp", 5)])
def test_reconstructions_come_nearer_with_the_rank(kind, order):
    model = encoder()
    exact = slices(model).stack
    errors = []
    for rank in (1, 2, 4):
        ranks = rank if kind == "cp" else tuple(min(rank, n) for n in _shape(order))
        converted = trawl(model, rank=ranks, kind=kind, order=order)
        errors.append((slices(converted.model).stack - exact).norm())
        assert 0 < converted.parameters < 1
    assert errors == sorted(errors, reverse=True)


def _shape(order):
    return {3: (24, 24, 24), 4: (2, 12, 24, 24), 5: (2, 12, HEADS, WIDTH // HEADS, 24)}[order]


@pytest.mark.parametrize("order", [3, 4, 5])
def test_tucker_of_full_ranks_is_exact_whole_and_layer_by_layer(order):
    model = encoder()
    found = trawl(model, rank=_shape(order), kind="tucker", order=order).model
    torch.testing.assert_close(found(ids()), model(ids()), rtol=1e-8, atol=1e-9)
    if order == 3:
        found = trawl(model, rank=(12, 24, 24), kind="tucker", layerwise=True).model
        torch.testing.assert_close(found(ids()), model(ids()), rtol=1e-8, atol=1e-9)


def test_cp_finds_a_tensor_of_its_rank():
    a, b, c = torch.randn(6, 2), torch.randn(5, 2), torch.randn(4, 2)
    x = torch.einsum("ir,jr,kr->ijk", a, b, c)
    whole, kept = cp(x, 2, iterations=500)
    assert (whole - x).norm() < 1e-2 * x.norm()
    assert kept == 2 * 15


def test_bad_ranks_and_kinds_are_refused():
    x = slices(encoder()).stack.flatten(0, 1)
    with pytest.raises(ValueError, match=r"`rank` must be between 1 and 24, .*got 25"):
        separate(x, 25)
    with pytest.raises(ValueError, match="`rank` must be between 1 and 24, the number of slices, got 30"):
        shared_cores(x, 4, 30)
    with pytest.raises(ValueError, match="`kind` must be cp or tucker"):
        trawl(encoder(), rank=2, kind="svd")
    with pytest.raises(ValueError, match="`rank` of tucker must have one rank a mode"):
        trawl(encoder(), rank=(1, 2), kind="tucker")
    with pytest.raises(ValueError, match="`rank` of cp must be one number"):
        trawl(encoder(), rank=(1, 2, 3), kind="cp")
    model = decoder()
    model.layers[0].mlp = torch.nn.Linear(7, 11)
    with pytest.raises(ValueError, match=r"`model` has a matrix of \(11, 7\)"):
        slices(model)
    model = encoder()
    model.layers[1].mlp = torch.nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ValueError, match=r"`model` has layers of \[2880, 6912\] weights"):
        slices(model)
