"""Sums of signed features and the normalizer held above its noise, against pairs and decays written out."""

import pytest
import torch

from attnlens.linalg.signed_features import SignedState, all_sums, causal_sums, held_ratio, held_rows, signed_attention


def features(n=20, r=6, dv=3):
    generator = torch.Generator().manual_seed(n)
    f_x, f_y, v = (torch.randn(2, 2, n, w, generator=generator, dtype=torch.float64) for w in (r, r, dv))
    return f_x, f_y + 0.7, v


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
    floor = f_x[..., exact:].norm(dim=-1) * spread / (6 - exact) ** 0.5
    mass = weights.sum(-1)
    expected = weights @ v / mass.maximum(floor)[..., None]
    torch.testing.assert_close(signed_attention(f_x, f_y, v, causal=causal, exact=exact), expected)
    sums = causal_sums(f_x, f_y, v, exact=exact)[1] if causal else all_sums(f_x, f_y, v, exact)
    held = held_rows(f_x, sums, exact)
    assert torch.equal(held, mass < floor)
    assert 0.1 < held.double().mean() < 0.9


def test_decayed_sums_equal_the_recurrence_and_resume():
    f_x, f_y, v = features()
    decay = -torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    last, sums = causal_sums(f_x, f_y, v, log_decay=decay, final_state=True)
    state, energy = torch.zeros(2, 2, 6, 4, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for i in range(20):
        extended = torch.cat([v[:, :, i], torch.ones_like(v[:, :, i, :1])], -1)
        state = decay[:, :, i].exp()[..., None, None] * state + f_y[:, :, i, :, None] * extended[..., None, :]
        energy = (2 * decay[:, :, i]).exp() * energy + f_y[:, :, i].square().sum(-1)
        torch.testing.assert_close(sums.products[:, :, i], (f_x[:, :, i, None] @ state)[:, :, 0])
        torch.testing.assert_close(sums.total[:, :, i], state[..., -1])
        torch.testing.assert_close(sums.energy[:, :, i], energy)
    torch.testing.assert_close(last, SignedState(state, energy))
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
    out = signed_attention(f_x, f_y, v, causal=False)
    assert (out == 0).all()
    out.sum().backward()
    assert f_y.grad.isfinite().all()


def test_rows_add_up_to_one_or_less_and_never_to_more():
    f_x, f_y, v = features(300, 4)
    rows = signed_attention(f_x, f_y, torch.ones_like(v), causal=False)
    held = held_rows(f_x, all_sums(f_x, f_y, v))
    torch.testing.assert_close(rows[~held], torch.ones_like(rows[~held]))
    assert (rows[held] < 1).all()
    assert rows.min() >= -(4**0.5) - 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_outputs_are_bounded_even_where_the_features_of_the_keys_cancel(causal):
    """Two keys with opposite features and values: the sum of features is zero, and was all that the floor knew."""
    f_x, f_y, v = features(40, 4)
    f_y, v = (torch.cat([x[:, :, :20], -x[:, :, :20].flip(2)], 2) for x in (f_y, v))
    out = signed_attention(f_x, f_y, v, causal=causal)
    lengths = (f_y.norm(dim=-1) * v.norm(dim=-1), f_y.square().sum(-1))
    weighed, energy = (x.cumsum(-1) if causal else x.sum(-1, keepdim=True) for x in lengths)
    assert (out.norm(dim=-1) <= 2 * weighed / energy.sqrt() + 1e-12).all()
    total = all_sums(f_x, f_y, v).total
    assert total.abs().max() < 1e-12
    assert held_ratio(f_x, all_sums(f_x, f_y, v)).norm() > 1
