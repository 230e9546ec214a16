"""What every projection that keeps less than keys and values promises: one run, its cache, memory, padding."""

import pytest
import torch

from attnlens.attention.linear import Linear
from attnlens.attention.retention import Retention
from attnlens.attention.softmax import Softmax
from attnlens.attention.streaming import Streaming
from attnlens.attention.window import Window
from attnlens.cache.full import Full
from attnlens.cache.quantized import Quantized
from attnlens.cache.sliding import Sliding
from attnlens.position.rope import Rope
from attnlens.projection.collaborative import Collaborative
from attnlens.projection.factored import FEW
from attnlens.projection.mla import Mla
from attnlens.projection.tpa import Tpa

WIDTH, HEADS, LENGTH = 24, 3, 22


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mla(operator, **options):
    settings = {"rotary_dim": 4, "position": Rope(4, LENGTH), **options}
    return Mla(operator, WIDTH, HEADS, 10, **settings)


LAYERS = {
    "mla": mla,
    "mla with a latent query": lambda operator: mla(operator, query_rank=7, scale=0.4),
    "mla without rotation": lambda operator: mla(operator, rotary_dim=0, position=None, latent_norm=False),
    "collaborative": lambda operator: Collaborative(operator, WIDTH, HEADS, 10),
    "collaborative with biases": lambda operator: Collaborative(
        operator, WIDTH, HEADS, 7, content_bias=True, bias=True
    ),
    "tpa": lambda operator: Tpa(operator, WIDTH, HEADS, 2, 2, 3, position=Rope(8, LENGTH)),
    "tpa of order 3": lambda operator: Tpa(
        operator, WIDTH, HEADS, 5, 2, 1, feature_dims=[2, 4], position=Rope(4, LENGTH)
    ),
    "tpa with constants": lambda operator: Tpa(
        operator, WIDTH, HEADS, 3, 1, 3, contextual=False, position=Rope(8, LENGTH)
    ),
}
OPERATORS = {"softmax": Softmax, "linear": Linear, "retention": Retention, "window": lambda: Window(3)}


@pytest.mark.parametrize("lengths", [[1] * LENGTH, [3, 1, LENGTH - 4], [FEW + 1, 2, LENGTH - FEW - 3], [LENGTH]])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", LAYERS)
def test_decoding_equals_one_run(name, operator, lengths):
    layer = LAYERS[name](OPERATORS[operator]())
    x = torch.randn(2, LENGTH, WIDTH)
    cache, outputs = layer.init_cache(2, capacity=LENGTH), []
    for part in x.split(lengths, dim=1):
        cache, y = layer.step(cache, part)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x, causal=True))


@pytest.mark.parametrize("name", LAYERS)
def test_scores_and_means_equal_those_of_expanded_heads(name):
    """Also their gradients, although only decoding runs in the compressed form."""
    layer = LAYERS[name](Softmax())
    x = torch.randn(2, 6, WIDTH)
    query, kept = layer.place(layer.query(x), layer.keep(x), 0)
    k, v = layer.expand(kept)
    q = layer.expand_query(query)
    weights = torch.rand(2, HEADS, 6, 6)
    pairs = [(layer.scores(query, kept), q @ k.mT * q.shape[-1] ** -0.5), (layer.mix(weights, kept), weights @ v)]
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected)
        probe = torch.randn_like(ours)
        grads = [
            torch.autograd.grad((z * probe).sum(), list(layer.parameters()), retain_graph=True, allow_unused=True)
            for z in (ours, expected)
        ]
        for a, b in zip(*grads, strict=True):
            if b is not None:
                torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_the_widths_of_the_heads_are_those_declared(name):
    layer = LAYERS[name](Softmax())
    x = torch.randn(2, 6, WIDTH)
    k, v = layer.expand(layer.keep(x))
    assert (k.shape[-1], v.shape[-1]) == layer.head_dims
    assert layer.expand_query(layer.query(x)).shape == k.shape
    assert tuple(part.shape[-1] for part in layer.keep(x)) == layer.kept


@pytest.mark.parametrize("name", LAYERS)
def test_the_cache_holds_what_is_kept_and_nothing_else(name):
    layer = LAYERS[name](Softmax())
    cache, _ = layer.step(layer.init_cache(3, 10), torch.randn(3, 7, WIDTH))
    assert Full().num_bytes(cache.state) == 8 * 3 * 7 * layer.cache_floats
    assert layer.cache_floats == sum(layer.kept)


@pytest.mark.parametrize("n", [4, FEW + 1])
@pytest.mark.parametrize("operator", ["softmax", "linear"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_remembered_memory_serves_like_the_memory(name, operator, n):
    layer = LAYERS[name](OPERATORS[operator]())
    x, memory = torch.randn(3, n, WIDTH), torch.randn(3, 5, WIDTH)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    poisoned = torch.where(mask[..., None], memory, torch.nan)
    remembered = layer.remember(poisoned, key_padding_mask=mask)
    expected = layer(x, memory=poisoned, key_padding_mask=mask)
    assert expected.isfinite().all()
    torch.testing.assert_close(layer.recall(remembered, x, mask), expected)
    torch.testing.assert_close(layer.recall(layer.remember(memory), x), layer(x, memory=memory))


@pytest.mark.parametrize("name", LAYERS)
def test_padding_and_the_future_are_never_read(name):
    layer = LAYERS[name](Softmax())
    x = torch.randn(2, 9, WIDTH)
    mask = (torch.arange(9) < 6).expand(2, 9)
    poisoned = torch.where(mask[..., None], x, torch.nan)
    torch.testing.assert_close(layer(poisoned, key_padding_mask=mask)[:, :6], layer(x[:, :6]))
    changed = torch.where(mask[..., None], x, 9.0)
    torch.testing.assert_close(layer(changed, causal=True)[:, :6], layer(x, causal=True)[:, :6], rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_made_on_the_host(name):
    """Built, run and decoded on the meta device; a tensor from elsewhere would not combine with its own."""
    with torch.device("meta"):
        layer, x = LAYERS[name](Softmax()), torch.zeros(2, 6, WIDTH)
    assert layer(x, causal=True).is_meta
    cache, _ = layer.step(layer.init_cache(2, 6), x[:, :4])
    assert layer.step(cache, x[:, 4:])[1].is_meta


@pytest.mark.parametrize("name", LAYERS)
def test_a_cache_is_a_value(name):
    """Two continuations of one prefix do not disturb each other."""
    layer = LAYERS[name](Softmax())
    x = torch.randn(1, 6, WIDTH)
    with torch.no_grad():
        prefix, _ = layer.step(layer.init_cache(1, 6), x[:, :4])
        _, first = layer.step(prefix, x[:, 4:])
        layer.step(prefix, torch.randn(1, 2, WIDTH))
        _, again = layer.step(prefix, x[:, 4:])
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_keeps_its_dtype_and_decodes_as_well_as_it_runs(name):
    layer, x = LAYERS[name](Softmax()), torch.randn(2, LENGTH, WIDTH).bfloat16()
    expected = layer(x.double(), causal=True)[:, -1:]
    layer.bfloat16()
    with torch.no_grad():
        cache, _ = layer.step(layer.init_cache(2, LENGTH), x[:, :-1])
        _, y = layer.step(cache, x[:, -1:])
        run = layer(x, causal=True)[:, -1:]
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= 1.5 * (run - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_bad_caches_and_memories_are_refused(name):
    layer, x = LAYERS[name](Softmax()), torch.zeros(1, 4, WIDTH)
    with pytest.raises(ValueError, match="`capacity` of the cache is 3, got token 4"):
        layer.step(layer.init_cache(1, 3, Full()), x)
    with pytest.raises(ValueError, match="`causal=True` has no meaning over a `memory`"):
        layer(x, memory=x, causal=True)
    with pytest.raises(ValueError, match="`cache` Full keeps keys and values for exact attention, and Linear"):
        LAYERS[name](Linear()).init_cache(1, 3, Full())


def stepped(layer, x, lengths, policy):
    cache, outputs = layer.init_cache(x.shape[0], x.shape[1], policy), []
    for part in x.split(lengths, dim=1):
        cache, y = layer.step(cache, part)
        outputs.append(y)
    return cache, torch.cat(outputs, dim=1)


@pytest.mark.parametrize("lengths", [[1] * LENGTH, [5, 1, LENGTH - 6]])
@pytest.mark.parametrize("name", LAYERS)
def test_a_sliding_cache_is_streaming_attention(name, lengths):
    x = torch.randn(2, LENGTH, WIDTH)
    layer = LAYERS[name](Softmax())
    _, out = stepped(layer, x, lengths, Sliding(4, num_sinks=2))
    layer.attention = Streaming(4, num_sinks=2)
    torch.testing.assert_close(out, layer(x, causal=True))


@pytest.mark.parametrize("name", LAYERS)
def test_codes_are_near_and_smaller(name):
    x, layer = torch.randn(1, LENGTH, WIDTH), LAYERS[name](Softmax())
    with torch.no_grad():
        coded, out = stepped(layer, x, 1, Full(Quantized(8, group=4, residual=4)))
        whole = layer(x, causal=True)
    assert 0 < (out - whole).norm() < 0.02 * whole.norm()
    groups, *widths = layer.policy_dims
    assert Full().num_bytes(coded.state) < 8 * LENGTH * groups * sum(widths)


def test_a_policy_over_latents_keeps_them_as_keys_and_as_values():
    layer, x = mla(Softmax()), torch.randn(1, LENGTH, WIDTH)
    cache, _ = stepped(layer, x, 1, Sliding(4, num_sinks=2))
    assert Full().num_bytes(cache.state) == 8 * 6 * (10 + 4 + 10)
    cache, _ = stepped(layer, x, 1, Full())
    assert Full().num_bytes(cache.state) == 8 * LENGTH * (10 + 4)
