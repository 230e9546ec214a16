"""The band as a mergeable part: out and lse of the dense form under the band, and blocks that fold back."""

import pytest
import torch

from attnlens.linalg.band import band, from_blocks, hidden_keys, to_blocks
from attnlens.testing.inputs import EXACT, gaussian


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("skip", [None, 2, 3])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (5, 2), (12, 4), (13, 4), (13, 1), (9, 40)])
def test_out_and_lse_equal_the_dense_band(length, window, skip, causal):
    if causal and skip is not None:
        pytest.skip("keys are skipped in the bidirectional band only")
    if skip is not None and window > length:
        pytest.skip("a window beyond the sequence is not cut into blocks")
    q, k, v = gaussian(length, value_dim=5)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, length // 2 :] = False
    gap = torch.arange(length)[:, None] - torch.arange(length)
    visible = (gap.abs() < window) & (gap >= (0 if causal else -length))
    visible = visible if skip is None else visible & (gap % skip != 0)
    for padding in (None, mask):
        seen = visible[None, None] if padding is None else visible & padding[:, None, None]
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        out, lse = band(q, k, v, window, causal=causal, key_padding_mask=padding, skip=skip)
        assert torch.equal(lse.isneginf(), scores.isneginf().all(-1))
        expected = scores.logsumexp(-1)
        shown = ~expected.isneginf()
        assert torch.allclose(lse[shown], expected[shown], atol=EXACT)
        weights = torch.softmax(scores.masked_fill(~shown[..., None], 0), -1).masked_fill(~shown[..., None], 0)
        assert torch.allclose(out, weights @ v, atol=EXACT)


@pytest.mark.parametrize(("length", "size"), [(1, 1), (12, 4), (13, 4), (3, 5)])
def test_blocks_fold_back_and_hide_what_fills_them_up(length, size):
    x = gaussian(length)[0]
    blocks = to_blocks(x, size)
    assert blocks.shape == (2, -(-length // size), 2, size, 8)
    assert torch.equal(from_blocks(blocks, length), x)
    hidden = hidden_keys(None, length, size, x)
    if length % size == 0:
        assert hidden is None
    else:
        assert hidden is not None
        assert torch.equal(hidden.flatten() == 0, torch.arange(blocks.shape[1] * size) < length)
