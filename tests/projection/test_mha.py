"""Mha: equal to PyTorch's, whatever the packing; padding, memory and decoding."""

import pytest
import torch

from attnlens.attention.identity import Identity
from attnlens.attention.mean import Mean
from attnlens.attention.softmax import Softmax
from attnlens.attention.third_order import ThirdOrder
from attnlens.attention.third_order_taylor import ThirdOrderTaylor
from attnlens.position.rope import Rope
from attnlens.projection.convolution import ShortConvolution
from attnlens.projection.mha import Mha

WIDTH, HEADS = 12, 3


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mha(operator=None, **options):
    return Mha(operator or Softmax(), WIDTH, HEADS, **options)


def test_equals_pytorch():
    ours = mha()
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([linear.weight for linear in ours.inputs]))
        theirs.out_proj.weight.copy_(ours.output.weight)
    x, memory = torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
    expected = theirs(x, memory, memory, key_padding_mask=~mask)[0]
    torch.testing.assert_close(ours(x, memory=memory, key_padding_mask=mask), expected)


@pytest.mark.parametrize("taps", [None, 3])
@pytest.mark.parametrize("cross", [False, True])
def test_packed_equals_separate(taps, cross):
    separate, packed = mha(short_convolution=taps, bias=True), mha(short_convolution=taps, packed=True, bias=True)
    state = separate.state_dict()
    for kind in ("weight", "bias"):
        state[f"inputs.0.{kind}"] = torch.cat([state.pop(f"inputs.{i}.{kind}") for i in range(3)])
    packed.load_state_dict(state)
    x = torch.randn(2, 6, WIDTH)
    memory = torch.randn(2, 4, WIDTH) if cross else None
    torch.testing.assert_close(packed(x, memory=memory), separate(x, memory=memory))


@pytest.mark.parametrize("taps", [None, 3])
def test_padding_is_never_read(taps):
    layer = mha(short_convolution=taps, position=Rope(WIDTH // HEADS, 9))
    x = torch.randn(2, 9, WIDTH)
    mask = (torch.arange(9) < 6).expand(2, 9)
    poisoned = torch.where(mask[..., None], x, torch.nan)
    torch.testing.assert_close(layer(poisoned, key_padding_mask=mask)[:, :6], layer(x[:, :6]))


def test_causal_outputs_ignore_the_future():
    layer = mha(short_convolution=3, position=Rope(WIDTH // HEADS, 9))
    x = torch.randn(1, 9, WIDTH)
    changed = torch.cat([x[:, :5], torch.randn(1, 4, WIDTH)], dim=1)
    torch.testing.assert_close(layer(changed, causal=True)[:, :5], layer(x, causal=True)[:, :5], rtol=0, atol=0)


@pytest.mark.parametrize("operator", [Softmax, Mean, Identity])
@pytest.mark.parametrize("taps", [None, 1, 3])
@pytest.mark.parametrize("lengths", [[1] * 8, [3, 1, 4], [8]])
def test_decoding_equals_one_run(operator, taps, lengths):
    layer = mha(operator(), short_convolution=taps, position=Rope(WIDTH // HEADS, 8))
    x = torch.randn(2, 8, WIDTH)
    cache, outputs = layer.init_cache(2, capacity=8), []
    for part in x.split(lengths, dim=1):
        cache, y = layer.step(cache, part)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x, causal=True))


def test_a_cache_is_a_value():
    """Two continuations of one prefix do not disturb each other."""
    layer = mha(short_convolution=3)
    x = torch.randn(1, 6, WIDTH)
    prefix, _ = layer.step(layer.init_cache(1, 6), x[:, :4])
    _, first = layer.step(prefix, x[:, 4:])
    layer.step(prefix, torch.randn(1, 2, WIDTH))
    _, again = layer.step(prefix, x[:, 4:])
    assert torch.equal(first, again)


def test_a_full_cache_is_refused():
    layer = mha()
    with pytest.raises(ValueError, match=r"`capacity` of the cache is 3, got token 4"):
        layer.step(layer.init_cache(1, 3), torch.zeros(1, 4, WIDTH))


def test_a_causal_memory_and_a_width_that_does_not_divide_are_refused():
    x = torch.zeros(1, 2, WIDTH)
    with pytest.raises(ValueError, match="`causal=True` has no meaning over a `memory`"):
        mha()(x, memory=x, causal=True)
    with pytest.raises(ValueError, match="`width` must be a multiple of `num_heads`, got 12 and 5"):
        Mha(Softmax(), 12, 5)


def test_short_convolution_is_causal_depthwise_and_starts_near_the_identity():
    convolve = ShortConvolution(4, 3)
    x, past = torch.randn(2, 7, 4), torch.zeros(2, 2, 4)
    kernel = convolve.weight.detach().flip(0).T[:, None]
    padded = torch.nn.functional.pad(x.mT, (2, 0))
    torch.testing.assert_close(convolve(x, past), torch.nn.functional.conv1d(padded, kernel, groups=4).mT)
    assert 0 < (convolve(x, past) - x).abs().max() < 0.5
    with pytest.raises(ValueError, match="`short_convolution` must be at least 1, got 0"):
        ShortConvolution(4, 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("taps", [None, 3])
@pytest.mark.parametrize("operator", [ThirdOrder(), ThirdOrderTaylor(2, WIDTH // HEADS)])
def test_an_operator_of_higher_arity_gets_its_keys_and_values_side_by_side(operator, taps, packed):
    """Shapes, causality by way of decoding, and the rotation of each key by itself."""
    rope = Rope(WIDTH // HEADS, 8)
    layer = mha(operator, packed=packed, short_convolution=taps, position=rope)
    assert sum(linear.out_features for linear in layer.inputs) == 5 * WIDTH
    x = torch.randn(2, 8, WIDTH)
    cache, outputs = layer.init_cache(2, capacity=8), []
    for part in x.split([3, 1, 4], dim=1):
        cache, y = layer.step(cache, part)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x, causal=True))
    if taps is None and not packed:
        q, k, v = (layer._heads(linear(x), HEADS) for linear in layer.inputs)
        (q, k1), (_, k2) = (rope.rotate(q, part) for part in k.chunk(2, -1))
        expected = operator(q, torch.cat([k1, k2], -1), v)
        torch.testing.assert_close(layer(x), layer.output(expected.transpose(1, 2).flatten(2)))


def test_arity_changes_no_weight_of_other_operators():
    """The same stream of random numbers as before there was an arity: three squares in a row, then the output."""
    torch.manual_seed(5)
    layer = mha()
    torch.manual_seed(5)
    plain = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)]
    for ours, theirs in zip((*layer.inputs, layer.output), plain, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
