"""Gqa: multi-head attention with shared keys and values, its limits, its cache."""

import pytest
import torch

from attnlens.attention.linear import Linear
from attnlens.attention.softmax import Softmax
from attnlens.attention.window import Window
from attnlens.cache.full import Full
from attnlens.position.rope import Rope
from attnlens.projection.gqa import Gqa
from attnlens.projection.mha import Mha

WIDTH, HEADS = 24, 6


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def gqa(groups, operator=None, **options):
    return Gqa(operator or Softmax(), WIDTH, HEADS, groups, **options)


def widened(layer):
    """Multi-head attention whose heads hold the matrices of their groups."""
    full = Mha(layer.attention, WIDTH, HEADS, position=layer.position)
    state = layer.state_dict()
    for name in ("inputs.1.weight", "inputs.2.weight"):
        groups = state[name].unflatten(0, (layer.num_groups, -1))
        state[name] = groups.repeat_interleave(HEADS // layer.num_groups, 0).flatten(0, 1)
    full.load_state_dict(state)
    return full


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("cross", [False, True])
def test_equals_multi_head_attention_with_equal_matrices_in_a_group(groups, cross):
    layer = gqa(groups, position=Rope(WIDTH // HEADS, 9))
    x, memory = torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH) if cross else None
    torch.testing.assert_close(layer(x, memory=memory), widened(layer)(x, memory=memory))


@pytest.mark.parametrize("operator", [Softmax, Linear, lambda: Window(3)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("taps", [None, 3])
@pytest.mark.parametrize("lengths", [[1] * 8, [3, 1, 4]])
def test_decoding_equals_one_run(operator, groups, taps, lengths):
    layer = gqa(groups, operator(), short_convolution=taps, position=Rope(WIDTH // HEADS, 8))
    x = torch.randn(2, 8, WIDTH)
    cache, outputs = layer.init_cache(2, capacity=8), []
    for part in x.split(lengths, dim=1):
        cache, y = layer.step(cache, part)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x, causal=True))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_cache_holds_two_vectors_a_group_and_token(groups):
    layer = gqa(groups)
    cache, _ = layer.step(layer.init_cache(3, 10), torch.randn(3, 7, WIDTH))
    floats = Full().num_bytes(cache.state) / 8
    assert floats == 3 * 7 * 2 * groups * (WIDTH // HEADS)


@pytest.mark.parametrize("taps", [None, 3])
def test_a_remembered_memory_serves_like_the_memory(taps):
    layer = gqa(2, short_convolution=taps)
    x, memory = torch.randn(2, 4, WIDTH), torch.randn(2, 5, WIDTH)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    remembered = layer.remember(memory, key_padding_mask=mask)
    poisoned = torch.where(mask[..., None], memory, torch.nan)
    torch.testing.assert_close(layer.recall(remembered, x, mask), layer(x, memory=poisoned, key_padding_mask=mask))


def test_bad_numbers_and_caches_are_refused():
    with pytest.raises(ValueError, match="`num_groups` must divide `num_heads`, got 4 and 6"):
        gqa(4)
    with pytest.raises(ValueError, match="`cache` Full keeps keys and values for exact attention, and Linear"):
        gqa(2, Linear()).init_cache(1, 4, Full())
