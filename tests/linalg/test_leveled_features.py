"""Features with a scale a key against the plain sums, and where plain sums overflow."""

import pytest
import torch

from attnlens.linalg.leveled_features import (
    common_level,
    empty_leveled,
    held_leveled,
    leveled,
    leveled_attention,
    leveled_step,
)
from attnlens.linalg.signed_features import all_sums, causal_sums, held_rows, signed_attention

MASK = torch.arange(20) < torch.tensor([20, 7])[:, None]


def features(n=20, r=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    f_x, f_y, v = (torch.randn(2, 2, n, w, generator=generator, dtype=torch.float64) for w in (r, r, 3))
    log_scale = 6 * torch.randn(2, 2, n, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (f_x + 0.8, f_y + 0.8, v, log_scale)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
def test_equals_the_plain_sums_at_any_common_scale(causal, mask):
    f_x, f_y, v, log_scale = features()
    plain = f_y * log_scale.exp()[..., None]
    plain = plain if mask is None else torch.where(mask[:, None, :, None], plain, 0)
    values = v if mask is None else torch.where(mask[:, None, :, None], v, 0)
    for shift in (0.0, 5000.0, -5000.0):
        found = leveled_attention(f_x, f_y, log_scale + shift, values, causal=causal, key_padding_mask=mask)
        expected = signed_attention(f_x, plain, values, causal=causal, key_padding_mask=mask)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-8)
        held = held_leveled(f_x, f_y, log_scale + shift, causal=causal, key_padding_mask=mask)
        expected = held_rows(f_x, causal_sums(f_x, plain, v)[1] if causal else all_sums(f_x, plain, v))
        assert torch.equal(held, expected)
        assert 0.05 < expected.double().mean() < 0.95


def test_a_later_key_of_any_size_changes_nothing_before_it_in_float32():
    """In units common to all keys those before a key e^100 times larger would underflow."""
    f_x, f_y, v, log_scale = features(dtype=torch.float32)
    log_scale = log_scale / 6
    before = leveled_attention(f_x, f_y, log_scale, v, causal=True, key_padding_mask=None)
    log_scale[:, :, 12:] += 200
    after = leveled_attention(f_x, f_y, log_scale, v, causal=True, key_padding_mask=None)
    assert torch.equal(after[:, :, :12], before[:, :, :12])
    assert after.isfinite().all()
    assert (common_level(f_y, log_scale, None)[:, :, :12] == 0).all()


def test_steps_continue_one_causal_run():
    f_x, f_y, v, log_scale = features()
    whole = leveled_attention(f_x, f_y, log_scale + 900, v, causal=True, key_padding_mask=None)
    state, outs = empty_leveled(2, 2, 40, 3, v), []
    for part in (slice(0, 1), slice(1, 14), slice(14, 20)):
        state, out = leveled_step(state, f_x[:, :, part], f_y[:, :, part], log_scale[:, :, part] + 900, v[:, :, part])
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(state.top, log_scale.amax(-1) + 900)


def test_levels_are_the_largest_entries_and_zero_stays_zero():
    f = features()[1]
    f[0, 0, 0] = 0
    unit, log_scale = leveled(f)
    torch.testing.assert_close(unit * log_scale.exp()[..., None], f)
    assert (unit[0, 0, 0] == 0).all()
    tops = unit.abs().amax(-1).flatten()[1:]
    torch.testing.assert_close(tops, torch.ones_like(tops))
