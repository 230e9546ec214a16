"""Collaborative: multi-head attention at full rank, bias included; the tensor that it factors; what it refuses."""

import pytest
import torch

from attnlens.attention.softmax import Softmax
from attnlens.position.rope import Rope
from attnlens.projection.collaborative import Collaborative, concatenated
from attnlens.projection.mha import Mha

WIDTH, HEADS = 24, 3


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def collaborative(rank, **options):
    return Collaborative(Softmax(), WIDTH, HEADS, rank, **options)


def of(full):
    """The maps of all heads side by side; the query bias as a content bias."""
    biased = full.inputs[0].bias is not None
    layer = collaborative(WIDTH, content_bias=biased, bias=biased)
    with torch.no_grad():
        layer.to_query.weight.copy_(full.inputs[0].weight)
        layer.key.weight.copy_(full.inputs[1].weight)
        layer.value.load_state_dict(full.inputs[2].state_dict())
        layer.output.load_state_dict(full.output.state_dict())
        if biased:
            keys, bias = (z.unflatten(0, (HEADS, -1)) for z in (full.inputs[1].weight, full.inputs[0].bias))
            layer.content.weight.copy_((bias[:, None] @ keys)[:, 0])
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_equals_multi_head_attention_at_full_rank(bias, cross):
    """With a bias: the key bias is gone without a trace, the query bias is the content bias."""
    full = Mha(Softmax(), WIDTH, HEADS, bias=bias)
    layer, x = of(full), torch.randn(2, 7, WIDTH)
    memory = torch.randn(2, 5, WIDTH) if cross else None
    torch.testing.assert_close(layer(x, memory=memory), full(x, memory=memory))
    if not cross:
        cache = layer.init_cache(2, 7)
        for t in range(7):
            cache, y = layer.step(cache, x[:, t : t + 1])
        torch.testing.assert_close(y, full(x, causal=True)[:, -1:])


def test_without_the_content_bias_a_query_bias_is_lost():
    full = Mha(Softmax(), WIDTH, HEADS, bias=True)
    layer, x = of(full), torch.randn(2, 7, WIDTH)
    layer.content.weight.data.zero_()
    assert (layer(x) - full(x)).abs().max() > 1e-4


@pytest.mark.parametrize("rank", [1, 2, 7, 24])
def test_the_products_of_the_heads_are_a_canonical_polyadic_decomposition(rank):
    layer = collaborative(rank)
    torch.nn.init.normal_(layer.mixing)
    x, y = torch.randn(1, 4, WIDTH), torch.randn(1, 6, WIDTH)
    products = torch.einsum("rd,hr,re->hde", layer.to_query.weight, layer.mixing, layer.key.weight)
    expected = x[:, None] @ products @ y[:, None].mT * (WIDTH // HEADS) ** -0.5
    torch.testing.assert_close(layer.scores(layer.query(x), layer.keep(y)), expected)


@pytest.mark.parametrize(("rank", "rows"), [(6, [3, 3]), (5, [3, 2]), (1, [1, 1])])
def test_the_first_mixing_gives_every_head_a_block(rank, rows):
    mixing = concatenated(2, rank)
    assert mixing.sum(1).tolist() == rows
    assert mixing.sum(0).min() >= 1


def test_the_cache_saves_only_on_keys():
    assert collaborative(10).cache_floats == 10 + WIDTH
    assert collaborative(10, content_bias=True).cache_floats == 10 + HEADS + WIDTH


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="`rank` must be between 1 and `width` = 24, where it is exact, got 25"):
        collaborative(25)
    with pytest.raises(ValueError, match=r"`position` Rope rotates queries and keys.*use position=none"):
        collaborative(8, position=Rope(8, 4))
    with pytest.raises(ValueError, match="`width` must be a multiple of `num_heads`, got 25 and 3"):
        Collaborative(Softmax(), 25, HEADS, 4)
