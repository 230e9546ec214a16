"""Sums of signed features and the normalizer held above its noise, against pairs and decays written out."""

import pytest
import torch

from attnlens.linalg.signed_features import causal_sums, held_ratio, held_rows, noise_floor, signed_attention


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
    floor = f_x[..., exact:].norm(dim=-1) * total[..., exact:].norm(dim=-1) / (6 - exact) ** 0.5
    mass = weights.sum(-1)
    expected = weights @ v / mass.maximum(floor)[..., None]
    torch.testing.assert_close(signed_attention(f_x, f_y, v, causal=causal, exact=exact), expected)
    held = held_rows(f_x, f_y, causal=causal, exact=exact)
    assert torch.equal(held, mass < floor)
    assert 0.1 < held.double().mean() < 0.9


def test_decayed_sums_equal_the_recurrence_and_resume():
    f_x, f_y, v = features()
    decay = -torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    moment, sums, total = causal_sums(f_x, f_y, v, log_decay=decay, final_state=True)
    state = torch.zeros(2, 2, 6, 4, dtype=torch.float64)
    for i in range(20):
        extended = torch.cat([v[:, :, i], torch.ones_like(v[:, :, i, :1])], -1)
        state = decay[:, :, i].exp()[..., None, None] * state + f_y[:, :, i, :, None] * extended[..., None, :]
        torch.testing.assert_close(sums[:, :, i], (f_x[:, :, i, None] @ state)[:, :, 0])
        torch.testing.assert_close(total[:, :, i], state[..., -1])
    torch.testing.assert_close(moment, state)
    for log_decay in (None, decay):
        cut = [None if log_decay is None else part for part in decay.split(13, 2)]
        whole = causal_sums(f_x, f_y, v, log_decay=log_decay, final_state=True)
        first, second = zip(f_x.split(13, 2), f_y.split(13, 2), v.split(13, 2), strict=True)
        past = causal_sums(*first, log_decay=cut[0], final_state=True)[0]
        resumed = causal_sums(*second, log_decay=cut[1], past=past, final_state=True)
        torch.testing.assert_close(resumed[0], whole[0])
        torch.testing.assert_close(resumed[1], whole[1][:, :, 13:])
        torch.testing.assert_close(resumed[2], whole[2][:, :, 13:])


def test_a_row_that_saw_nothing_is_zero_with_finite_gradients():
    f_x, _, v = features()
    f_y = torch.zeros_like(f_x).requires_grad_()
    out = signed_attention(f_x, f_y, v, causal=False)
    assert (out == 0).all()
    out.sum().backward()
    assert f_y.grad.isfinite().all()


def test_rows_add_up_to_one_or_less_and_never_to_more():
    f_x, f_y, v = features(300, 4)
    ones = torch.ones_like(v)
    sums, total = (f_x @ (f_y.mT @ torch.ones_like(v[..., :1]).expand(-1, -1, -1, 4))), f_y.sum(2, keepdim=True)
    rows = held_ratio(f_x, sums, total)
    torch.testing.assert_close(rows[..., :3], signed_attention(f_x, f_y, ones, causal=False))
    held = held_rows(f_x, f_y, causal=False)
    torch.testing.assert_close(rows[~held], torch.ones_like(rows[~held]))
    assert (rows[held] < 1).all()
    assert rows.min() >= -(4**0.5) - 1e-12
    assert (noise_floor(f_x, total) > 0).all()
