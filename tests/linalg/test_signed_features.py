"""Sums of signed features and the normalizer held above its noise, against pairs and decays written out."""

import pytest
import torch

from attnlens.linalg.signed_features import (
    CAUTION,
    SignedState,
    all_sums,
    causal_sums,
    held_ratio,
    held_rows,
    signed_attention,
)


def features(n=20, r=40, dv=3):
    generator = torch.Generator().manual_seed(n)
    f_x, f_y, v = (torch.randn(2, 2, n, w, generator=generator, dtype=torch.float64) for w in (r, r, dv))
    return f_x + 0.5, f_y + 0.7, v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exact", [0, 2])
def test_equals_the_matrix_of_pairs(causal, exact):
    f_x, f_y, v = features()
    seen = torch.ones(20, 20, dtype=torch.float64)
    seen = seen.tril() if causal else seen
    weights, total = (f_x @ f_y.mT) * seen, seen @ f_y
    energy = (seen @ f_y[..., exact:].square().sum(-1, keepdim=True)).squeeze(-1)
    spread = total[..., exact:].norm(dim=-1).maximum(energy.sqrt())
    assert (spread > energy.sqrt()).any()
    floor = CAUTION * f_x[..., exact:].norm(dim=-1) * spread / (40 - exact) ** 0.5
    mass = weights.sum(-1)
    # What the sum lacks to the floor, spread over all keys alike.
    lacking = seen / seen.sum(-1, keepdim=True) * (floor - mass).clamp_min(0)[..., None]
    expected = (weights + lacking) @ v / mass.maximum(floor)[..., None]
    torch.testing.assert_close(signed_attention(f_x, f_y, v, causal=causal, exact=exact), expected)
    sums = causal_sums(f_x, f_y, v, exact=exact)[1] if causal else all_sums(f_x, f_y, v, exact=exact)
    held = held_rows(f_x, sums, exact)
    assert torch.equal(held, mass < floor)
    assert 0.1 < held.double().mean() < 0.9


def test_decayed_sums_equal_the_recurrence_and_resume():
    f_x, f_y, v = features()
    decay = -torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    last, sums = causal_sums(f_x, f_y, v, log_decay=decay, final_state=True)
    state, energy = torch.zeros(2, 2, 40, 4, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for i in range(20):
        extended = torch.cat([v[:, :, i], torch.ones_like(v[:, :, i, :1])], -1)
        state = decay[:, :, i].exp()[..., None, None] * state + f_y[:, :, i, :, None] * extended[..., None, :]
        energy = (2 * decay[:, :, i]).exp() * energy + f_y[:, :, i].square().sum(-1)
        torch.testing.assert_close(sums.products[:, :, i], (f_x[:, :, i, None] @ state)[:, :, 0])
        torch.testing.assert_close(sums.total[:, :, i], state[..., -1])
        torch.testing.assert_close(sums.energy[:, :, i], energy)
    values = torch.cat([v.sum(2), torch.full_like(v[:, :, 0, :1], 20)], -1)
    torch.testing.assert_close(last, SignedState(state, energy, values))
    torch.testing.assert_close(sums.mean[:, :, -1], v.mean(2))
    for log_decay in (None, decay):
        cut = [None if log_decay is None else part for part in decay.split(13, 2)]
        whole = causal_sums(f_x, f_y, v, log_decay=log_decay, final_state=True)
        first, second = zip(f_x.split(13, 2), f_y.split(13, 2), v.split(13, 2), strict=True)
        past = causal_sums(*first, log_decay=cut[0], final_state=True)[0]
        resumed = causal_sums(*second, log_decay=cut[1], past=past, final_state=True)
        torch.testing.assert_close(resumed[0], whole[0])
        for found, expected in zip(resumed[1], whole[1], strict=True):
            torch.testing.assert_close(found, expected[:, :, 13:])


def test_a_row_that_saw_nothing_is_zero_with_finite_gradients():
    f_x, _, v = features()
    f_y = torch.zeros_like(f_x).requires_grad_()
    nothing = torch.zeros(2, 20, dtype=torch.bool)
    for causal in (False, True):
        out = signed_attention(f_x, f_y, torch.zeros_like(v), causal=causal, key_padding_mask=nothing)
        assert (out == 0).all()
        assert torch.autograd.grad(out.sum(), f_y)[0].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_every_row_adds_up_to_one_and_held_rows_are_drawn_to_the_mean(causal):
    f_x, f_y, v = features(300)
    rows = signed_attention(f_x, f_y, torch.ones_like(v), causal=causal)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    first = signed_attention(-f_y[:, :, :1], f_y[:, :, :1], v[:, :, :1], causal=causal)
    torch.testing.assert_close(first, v[:, :, :1])
    sums = causal_sums(f_x, f_y, v)[1] if causal else all_sums(f_x, f_y, v)
    held, plain = held_rows(f_x, sums), sums.products[..., :-1] / sums.products[..., -1:]
    away, plainly = ((x - sums.mean).norm(dim=-1) for x in (held_ratio(f_x, sums), plain))
    torch.testing.assert_close(away[~held], plainly[~held])
    assert (away[held] <= plainly[held] + 1e-9)[sums.products[..., -1][held] > 0].all()
    assert 0.05 < held.double().mean() < 0.95


@pytest.mark.parametrize("causal", [False, True])
def test_outputs_are_bounded_even_where_the_features_of_the_keys_cancel(causal):
    """Keys in pairs with opposite features and values: the sum of features is zero, and was all that the floor knew."""
    f_x, f_y, v = features(40, 4)
    f_y, v = (torch.cat([x[:, :, :20], -x[:, :, :20].flip(2)], 2) for x in (f_y, v))
    sums = causal_sums(f_x, f_y, v)[1] if causal else all_sums(f_x, f_y, v)
    away = (held_ratio(f_x, sums) - sums.mean).norm(dim=-1)
    seen = torch.ones(40, 40, dtype=torch.float64)
    seen = seen.tril() if causal else seen
    distance = (v[:, :, None] - sums.mean[:, :, :, None]).norm(dim=-1)
    reach = (seen * distance * f_y.norm(dim=-1)[:, :, None]).sum(-1)
    assert (away <= 2 / CAUTION * reach / sums.energy.sqrt() + 1e-9).all()
    assert sums.total[:, :, -1].abs().max() < 1e-12
    assert away[:, :, -1].min() > 0.01
