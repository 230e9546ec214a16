"""Tpa: the sums written out, multi-head, grouped-query and multi-query attention as special cases, higher order."""

import pytest
import torch

from attnlens.attention.softmax import Softmax
from attnlens.position.rope import Rope
from attnlens.projection.gqa import Gqa
from attnlens.projection.tpa import Tpa, grouped

WIDTH, HEADS, HEAD = 48, 6, 8


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def tpa(*ranks, **options):
    return Tpa(Softmax(), WIDTH, HEADS, *ranks, **options)


def decoded(layer, x):
    cache, outputs = layer.init_cache(x.shape[0], x.shape[1]), []
    for token in x.split(1, dim=1):
        cache, y = layer.step(cache, token)
        outputs.append(y)
    return torch.cat(outputs, 1)


def test_queries_keys_and_values_are_the_sums_of_outer_products():
    layer, x = tpa(5, 2, 3), torch.randn(1, 4, WIDTH)
    k, v = layer.expand(layer.keep(x))
    heads = {"queries": layer.expand_query(layer.query(x)), "keys": k, "values": v}
    for name, ours in heads.items():
        factors = getattr(layer, name)
        a, b = (each.weight.unflatten(0, (factors.rank, -1)) for each in factors.maps)
        for n in range(4):
            expected = sum(torch.outer(a[r] @ x[0, n], b[r] @ x[0, n]) for r in range(factors.rank)) / factors.rank
            torch.testing.assert_close(ours[0, :, n], expected)


@pytest.mark.parametrize("ranks", [(1, 2, 2), (6, 2, 1)])
@pytest.mark.parametrize("feature_dims", [None, [2, 4], [2, 2, 2]])
def test_scores_follow_the_formula_of_the_factors(ranks, feature_dims):
    """In both orders of summation: the rank of the queries decides which is the cheaper."""
    layer, x = tpa(*ranks, feature_dims=feature_dims), torch.randn(1, 5, WIDTH)
    query, kept = layer.query(x), layer.keep(x)
    a, f = layer.queries.heads(query) * ranks[0], layer.queries.features(query)
    (keys, _), expected = layer._parts(kept), torch.zeros(HEADS, 5, 5)
    b, g = layer.keys.heads(keys) * ranks[1], layer.keys.features(keys)
    for r in range(ranks[0]):
        for t in range(ranks[1]):
            inner = torch.ones(5, 5)
            for ours, theirs in zip(f, g, strict=True):
                inner = inner * (ours[0, :, r] @ theirs[0, :, t].T)
            expected += a[0, :, r].T[:, :, None] * b[0, :, t].T[:, None] * inner / (ranks[0] * ranks[1])
    torch.testing.assert_close(layer.scores(query, kept)[0], expected * HEAD**-0.5)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("rotary", [False, True])
def test_constant_heads_are_grouped_query_attention(groups, rotary):
    """G = 6 is multi-head attention, G = 1 multi-query attention; the cache is theirs too."""
    position = Rope(HEAD, 7) if rotary else None
    layer = tpa(HEADS, groups, groups, contextual=False, position=position)
    theirs = Gqa(Softmax(), WIDTH, HEADS, groups, position=position)
    with torch.no_grad():
        for factors, linear in zip((layer.queries, layer.keys, layer.values), theirs.inputs, strict=True):
            factors.maps[0].weight.copy_(linear.weight)
        layer.output.weight.copy_(theirs.output.weight)
    x = torch.randn(2, 7, WIDTH)
    torch.testing.assert_close(layer(x, causal=True), theirs(x, causal=True))
    torch.testing.assert_close(decoded(layer, x), theirs(x, causal=True))
    assert layer.cache_floats == 2 * groups * HEAD


def test_the_rotation_turns_all_heads():
    """Turning b_r before the sum is turning the sum: the two maps act on different axes."""
    layer, x = tpa(3, 2, 2, position=Rope(HEAD, 5)), torch.randn(1, 5, WIDTH)
    query, kept = layer.query(x), layer.keep(x)
    expected = layer.position.rotate(layer.expand_query(query), layer.expand(kept)[0])
    query, kept = layer.place(query, kept, 0)
    torch.testing.assert_close(layer.expand_query(query), expected[0])
    torch.testing.assert_close(layer.expand(kept)[0], expected[1])


@pytest.mark.parametrize("feature_dims", [[2, 4], [2, 2, 2]])
def test_at_higher_order_scores_depend_on_the_distance_only(feature_dims):
    layer = tpa(3, 2, 2, feature_dims=feature_dims, position=Rope(feature_dims[-1], 30))
    x = torch.randn(1, 1, WIDTH).expand(1, 6, WIDTH)
    near, far = (layer.scores(*layer.place(layer.query(x), layer.keep(x), offset)) for offset in (0, 20))
    torch.testing.assert_close(near, far)
    assert (near[..., 0, 5] - near[..., 0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("feature_dims", [[2, 4], [2, 2, 2]])
def test_higher_order_features_are_outer_products(feature_dims):
    layer, x = tpa(3, 2, 2, feature_dims=feature_dims), torch.randn(1, 1, WIDTH)
    parts = [part[0, 0, 1] for part in layer.keys.features(layer.keys(x))]
    expected = parts[0]
    for part in parts[1:]:
        expected = torch.kron(expected, part)
    torch.testing.assert_close(layer.keys.rows(layer.keys(x))[0, 0, 1], expected)


@pytest.mark.parametrize(
    ("options", "floats"),
    [
        ({}, (2 + 3) * (HEADS + HEAD)),
        ({"feature_dims": [2, 4]}, (2 + 3) * (HEADS + 2 + 4)),
        ({"contextual": False}, (2 + 3) * HEAD),
    ],
)
def test_the_cache_holds_the_factors(options, floats):
    assert tpa(6, 2, 3, **options).cache_floats == floats


def test_the_rank_of_a_tokens_keys_is_at_most_that_of_the_sum():
    layer, x = tpa(3, 2, 4), torch.randn(1, 3, WIDTH)
    k, v = layer.expand(layer.keep(x))
    assert torch.linalg.matrix_rank(k.transpose(1, 2)).tolist() == [[2] * 3]
    assert torch.linalg.matrix_rank(v.transpose(1, 2)).tolist() == [[4] * 3]


def test_constants_are_the_indicators_of_the_groups_times_their_number():
    assert torch.equal(grouped(4, 2), torch.tensor([[2.0, 2, 0, 0], [0, 0, 2, 2]]))


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="`key_rank` must be between 1 and `width` = 48, got 49"):
        tpa(1, 49, 1)
    with pytest.raises(ValueError, match=r"`value_rank` must divide `num_heads` = 6 .*, got 4; or set `contextual`"):
        tpa(6, 2, 4, contextual=False)
    with pytest.raises(ValueError, match=r"`feature_dims` must multiply to the width of a head, 8, got \[2, 3\]"):
        tpa(1, 1, 1, feature_dims=[2, 3])
    with pytest.raises(ValueError, match="`width` must be a multiple of `num_heads`, got 49 and 6"):
        Tpa(Softmax(), 49, 6, 1, 1, 1)
