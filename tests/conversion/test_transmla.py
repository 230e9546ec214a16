"""TransMLA step by step: what is exact, and what the one approximation is."""

import pytest
import torch

from attnlens.conversion.base import heads, inputs, linears
from attnlens.conversion.transmla import mixing, transmla
from attnlens.models.generate import cache_bytes
from attnlens.position.rope import Rope
from attnlens.projection.mla import Mla
from tests.conversion.models import HEADS, LENGTH, decoder, encoder, ids

GROUPS, DIM = 3, 8


def layer(seed=0):
    """Activations, and one layer's maps: queries (h, w, d), keys and values (g, w, d)."""
    model = decoder(GROUPS, DIM)
    projection = model.layers[0].projection
    to_q, to_k, to_v = linears(projection)
    x = inputs(model, ids(1, seed))[0]
    return x, heads(to_q, HEADS), heads(to_k, GROUPS), heads(to_v, GROUPS)


def rotated(z, rope):
    """(h, n, d) by position."""
    return rope.rotate(z[None], z[None])[0][0]


def blocks(z):
    """(g, n, d) groups side by side as one key of g d columns, each block turned alike."""
    return z.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_the_mixing_is_orthogonal_and_commutes_with_the_rotation_where_it_may(fold):
    """Intermediate encoding and RoRoPE: scores of one shared, mixed key equal those of the groups; exact for fold 1."""
    x, query, key, _ = layer()
    rope, u = Rope(DIM, 32), mixing(x @ key, fold).matrix
    torch.testing.assert_close(u @ u.T, torch.eye(GROUPS * DIM))
    expected = torch.stack(
        [
            rotated((x @ query)[h : h + 1], rope)[0] @ rotated((x @ key)[h // 2 : h // 2 + 1], rope)[0].T
            for h in range(HEADS)
        ]
    )
    shared = (blocks(x @ key) @ u).unflatten(1, (GROUPS, DIM)).transpose(0, 1)
    found = []
    for h in range(HEADS):
        wide = torch.zeros(len(x), GROUPS, DIM)
        wide[:, h // 2] = (x @ query)[h]
        q = (wide.flatten(1) @ u).unflatten(1, (GROUPS, DIM)).transpose(0, 1)
        found.append(blocks(rotated(q, rope)) @ blocks(rotated(shared, rope)).T)
    error = (torch.stack(found) - expected).norm() / expected.norm()
    assert error < 1e-13 if fold == 1 else error > 1e-3


def test_the_first_virtual_head_holds_the_most_energy_and_folding_adds_to_it():
    x, _, key, _ = layer()
    shares = [mixing(x @ key, fold).energy for fold in (1, 2, 4)]
    for energy in shares:
        assert (energy.diff() <= 1e-12).all()
        torch.testing.assert_close(energy.sum(), torch.tensor(1.0))
    assert shares[0][0] > 1 / GROUPS
    assert shares[0][0] < shares[1][0] < shares[2][0]


@pytest.mark.parametrize("fold", [1, 2])
def test_at_full_rank_only_the_rotation_of_the_other_heads_is_lost(fold):
    """The layer equals the formula with every virtual head but the first left unrotated, to round-off."""
    model = decoder(GROUPS, DIM)
    converted = transmla(model, ids(8), (2 * GROUPS - 1) * DIM, fold=fold)
    x, query, key, value = layer(3)
    u, rope = mixing(inputs(model, ids(8))[0] @ key, fold).matrix, Rope(DIM, 32)
    shared = (blocks(x @ key) @ u).unflatten(1, (GROUPS, DIM)).transpose(0, 1)
    outs = []
    for h in range(HEADS):
        wide = torch.zeros(len(x), GROUPS, DIM)
        wide[:, h // 2] = (x @ query)[h]
        q = (wide.flatten(1) @ u).unflatten(1, (GROUPS, DIM)).transpose(0, 1)
        q, k = (torch.cat([rotated(z[:1], rope), z[1:]]) for z in (q, shared))
        weights = torch.softmax(
            (blocks(q) @ blocks(k).T * DIM**-0.5).masked_fill(~torch.ones(len(x), len(x)).tril().bool(), -torch.inf), -1
        )
        outs.append(weights @ (x @ value)[h // 2])
    expected = torch.cat(outs, 1) @ model.layers[0].projection.output.weight.T
    found = converted.model.layers[0].projection(x[None], causal=True)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_without_rotation_full_rank_is_exact_and_so_is_the_rank_of_the_activations():
    """Positions that are all equal rotate nothing away; more directions than activations have are of no use."""
    model = decoder(GROUPS, DIM)
    for block in model.layers:
        block.projection.position.cos.fill_(1)
        block.projection.position.sin.fill_(0)
    few = ids(1)
    full, ranked = transmla(model, few, (2 * GROUPS - 1) * DIM), transmla(model, few, few.numel())
    torch.testing.assert_close(full.model(ids(3, 5)), model(ids(3, 5)), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ranked.model(few), model(few), rtol=1e-6, atol=1e-7)


def test_errors_grow_as_the_rank_falls_and_the_cache_is_what_it_says():
    model = decoder(GROUPS, DIM)
    exact = model(ids(8))
    errors = []
    for rank in (40, 20, 10, 4, 1):
        converted = transmla(model, ids(8), rank)
        assert isinstance(converted.model.layers[0].projection, Mla)
        errors.append((converted.model(ids(8)) - exact).norm())
        cache, _ = converted.model.step(converted.model.init_cache(1, 10), ids(1))
        assert cache_bytes(cache) == 8 * 2 * LENGTH * converted.cache == 8 * 2 * LENGTH * (rank + DIM)
    assert errors == sorted(errors)


def test_what_cannot_be_converted_says_what_can():
    with pytest.raises(ValueError, match=r"`rank` must be between 1 and 40, .*got 41"):
        transmla(decoder(GROUPS, DIM), ids(), 41)
    with pytest.raises(ValueError, match="`fold` must divide the 4 frequencies, got 3"):
        transmla(decoder(GROUPS, DIM), ids(), 4, fold=3)
    with pytest.raises(ValueError, match="`model` has no rotating positions or has biases"):
        transmla(encoder(), ids(), 4)
