"""The formulas of cost against counted products, cached floats and parameters of built layers, in both forms."""

import math

import pytest
import torch

from attnlens.analysis.costs import Dense, counted, counted_products
from attnlens.projection.collaborative import Collaborative
from attnlens.projection.cost import Shape
from attnlens.projection.factored import AbstractFactored
from attnlens.projection.gqa import Gqa
from attnlens.projection.mha import Mha
from attnlens.projection.mla import Mla, merged_attention
from attnlens.projection.tpa import Tpa

SHAPE = Shape(48, 6, 8)
TPA = {"query_rank": 5, "key_rank": 2, "value_rank": 3}
LAYERS = {
    "mha": (Mha, {}),
    "gqa": (Gqa, {"num_groups": 2}),
    "mqa": (Gqa, {"num_groups": 1}),
    "mla": (Mla, {"rank": 10, "rotary_dim": 4}),
    "mla with a latent query": (Mla, {"rank": 10, "rotary_dim": 4, "query_rank": 7}),
    "mla without norms": (Mla, {"rank": 10, "rotary_dim": 0, "query_rank": 7, "latent_norm": False}),
    "tpa": (Tpa, TPA),
    "tpa through the ranks": (Tpa, {**TPA, "query_rank": 1}),
    "tpa of order 3": (Tpa, {**TPA, "feature_dims": [2, 4]}),
    "tpa of order 3 through the ranks": (Tpa, {**TPA, "query_rank": 2, "feature_dims": [2, 4]}),
    "tpa with constants": (Tpa, {"query_rank": 6, "key_rank": 2, "value_rank": 3, "contextual": False}),
    "collaborative": (Collaborative, {"rank": 10}),
    "collaborative with a content bias": (Collaborative, {"rank": 10, "content_bias": True}),
}
FACTORED = [name for name, (kind, _) in LAYERS.items() if issubclass(kind, AbstractFactored)]


def built(name):
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    return kind(Dense(), SHAPE.width, SHAPE.num_heads, **options)


@pytest.mark.parametrize("length", [1, 5, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_a_run_costs_what_the_formula_says(name, length):
    kind, options = LAYERS[name]
    found = counted(built(name), torch.randn(1, length, SHAPE.width))
    said = kind.cost(SHAPE, options, new=length)
    assert (found.products, found.cache, found.weights) == (said.products, said.cache, said.weights)


@pytest.mark.parametrize(("new", "past"), [(1, 0), (1, 40), (3, 40)])
@pytest.mark.parametrize("name", FACTORED)
def test_decoding_costs_what_the_formula_of_the_compressed_form_says(name, new, past):
    """The maps of the new tokens, then attention over what is kept of all."""
    kind, options = LAYERS[name]
    layer, x = built(name), torch.randn(1, past + new, SHAPE.width)
    cache = layer.init_cache(1, past + new)
    if past:
        cache, _ = layer.step(cache, x[:, :past])
    said = kind.compressed_cost(SHAPE, options, new=new, past=past)
    assert counted_products(lambda x: layer.step(cache, x), x[:, past:]) == said.products
    assert said.cache == layer.cache_floats


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa"])
def test_decoding_from_keys_and_values_costs_what_the_formula_says(name):
    """Only the maps are products that the counter sees: the attention is a fused kernel, counted by its pairs."""
    kind, options = LAYERS[name]
    layer, x = built(name), torch.randn(1, 41, SHAPE.width)
    cache, _ = layer.step(layer.init_cache(1, 41), x[:, :40])
    said = kind.cost(SHAPE, options, new=1, past=40)
    assert counted_products(lambda x: layer.step(cache, x), x[:, 40:]) == said.maps + said.final
    assert said.scores == said.means == 41 * SHAPE.num_heads * SHAPE.head_dim


@pytest.mark.parametrize("query_rank", [None, 7])
def test_merged_maps_cost_what_the_survey_says(query_rank):
    """A query map merges with W^LQ too where there is no norm between: then it starts from the tokens."""
    options = {"rank": 10, "rotary_dim": 0, "query_rank": query_rank}
    layer, x = Mla(Dense(), SHAPE.width, SHAPE.num_heads, **options), torch.randn(1, 5, SHAPE.width)
    merged = layer.merged()
    said = Mla.merged_cost(SHAPE, options, new=5)
    run = counted_products(lambda x: merged_attention(merged, x, layer.latent_query(x), layer.scale), x)
    assert run == said.products
    held = sum(map(math.prod, (part.shape for part in merged)))
    assert said.weights == held + (0 if query_rank is None else query_rank * SHAPE.width)


def test_grouped_formulas_are_those_of_the_survey():
    """(H + 2 G) N d d_head, N^2 H d_head twice, N H d_head d; floats H N (d_QK + d_head) + weights for G = H."""
    n, d, heads, e = 7, *SHAPE
    said = Gqa.cost(SHAPE, {"num_groups": 2}, new=n)
    assert said.maps == (heads + 2 * 2) * n * d * e
    assert said.scores == said.means == n * n * heads * e
    assert said.final == n * heads * e * d
    full = Mha.cost(SHAPE, {}, new=n)
    assert n * full.cache + full.weights == heads * n * 2 * e + 2 * heads * d * e + heads * e * (d + d)


def test_latent_formulas_are_those_of_the_survey():
    """N d d_L twice, H (N d_L^2 + N^2 d_L), H N^2 d_L, N H d_L d for d_LQ = d_L; floats N d_L + d d_L + H d_L 2 d."""
    n, (d, heads, _), rank = 7, SHAPE, 10
    said = Mla.merged_cost(SHAPE, {"rank": rank, "query_rank": rank}, new=n)
    assert said.maps == 2 * n * d * rank
    assert said.scores == heads * (n * rank**2 + n**2 * rank)
    assert said.means == heads * n**2 * rank
    assert said.final == n * heads * rank * d
    whole = Mla.merged_cost(SHAPE, {"rank": rank}, new=n)
    assert n * whole.cache + whole.weights == n * rank + d * rank + heads * rank * (d + d)
