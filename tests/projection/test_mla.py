"""Mla: the two forms, the merged maps, what it equals without a rotation, another implementation's result."""

import pytest
import torch

from attnlens.attention.softmax import Softmax
from attnlens.attention.third_order import ThirdOrder
from attnlens.linalg.dense import softmax_naive
from attnlens.position.rope import Rope
from attnlens.projection.mha import Mha
from attnlens.projection.mla import Mla

WIDTH, HEADS, RANK, ROTARY = 24, 3, 10, 4


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mla(rank=RANK, rotary_dim=ROTARY, **options):
    return Mla(Softmax(), WIDTH, HEADS, rank, rotary_dim=rotary_dim, **options)


def decoded(layer, x):
    cache, outputs = layer.init_cache(x.shape[0], x.shape[1]), []
    for token in x.split(1, dim=1):
        cache, y = layer.step(cache, token)
        outputs.append(y)
    return torch.cat(outputs, 1)


def test_equals_the_formulas_written_out():
    layer = mla(query_rank=7, position=Rope(ROTARY, 9))
    torch.nn.init.normal_(layer.latent_norm.weight)
    x, content = torch.randn(2, 9, WIDTH), WIDTH // HEADS

    def norm(z, weight):
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    down, rotary_key = layer.latent.weight.split((RANK, ROTARY))
    latent = norm(x @ down.T, layer.latent_norm.weight)
    latent_query = norm(x @ layer.latent_query[0].weight.T, layer.latent_query[1].weight)
    heads = []
    for h in range(HEADS):
        rows = slice(h * content, (h + 1) * content)
        q = latent_query @ layer.to_query.weight.T[:, h * (content + ROTARY) : (h + 1) * (content + ROTARY)]
        q_rotary, k_rotary = layer.position.rotate(q[:, None, :, content:], (x @ rotary_key.T)[:, None])
        k = torch.cat([latent @ layer.key.weight[rows].T, k_rotary[:, 0]], -1)[:, None]
        q = torch.cat([q[..., :content], q_rotary[:, 0]], -1)[:, None]
        heads.append(softmax_naive(q, k, (latent @ layer.value.weight[rows].T)[:, None], causal=True)[:, 0])
    expected = torch.cat(heads, -1) @ layer.output.weight.T
    torch.testing.assert_close(layer(x, causal=True), expected)
    torch.testing.assert_close(decoded(layer, x), expected)


@pytest.mark.parametrize("query_rank", [None, 6])
def test_without_rotation_it_is_multi_head_attention_with_the_products_of_its_maps(query_rank):
    layer = mla(rotary_dim=0, query_rank=query_rank, latent_norm=False)
    full = Mha(Softmax(), WIDTH, HEADS)
    query = layer.to_query.weight @ (torch.eye(WIDTH) if query_rank is None else layer.latent_query[0].weight)
    weights = [query, layer.key.weight @ layer.latent.weight, layer.value.weight @ layer.latent.weight]
    named = {f"inputs.{i}.weight": weight for i, weight in enumerate(weights)}
    full.load_state_dict(named | {"output.weight": layer.output.weight})
    x = torch.randn(2, 8, WIDTH)
    torch.testing.assert_close(layer(x, causal=True), full(x, causal=True))
    torch.testing.assert_close(decoded(layer, x), full(x, causal=True))


def test_every_multi_head_attention_without_positions_is_one_at_full_rank():
    """Keys and values of the heads read the tokens through the identity of rank d."""
    full, layer = Mha(Softmax(), WIDTH, HEADS), mla(rank=WIDTH, rotary_dim=0, latent_norm=False)
    with torch.no_grad():
        layer.latent.weight.copy_(torch.eye(WIDTH))
        for ours, theirs in zip((layer.to_query, layer.key, layer.value), full.inputs, strict=True):
            ours.weight.copy_(theirs.weight)
        layer.output.weight.copy_(full.output.weight)
    x = torch.randn(2, 8, WIDTH)
    torch.testing.assert_close(decoded(layer, x), full(x, causal=True))


@pytest.mark.parametrize("scale", [None, (WIDTH // HEADS) ** -0.5])
def test_the_scale_is_that_of_the_whole_query_unless_given(scale):
    layer = mla(scale=scale)
    x = torch.randn(1, 6, WIDTH)
    query, kept = layer.query(x), layer.keep(x)
    plain = query[0] @ layer.expand(kept)[0].mT
    torch.testing.assert_close(layer.scores(query, kept), plain * (scale or (WIDTH // HEADS + ROTARY) ** -0.5))
    torch.testing.assert_close(decoded(layer, x), layer(x, causal=True))


@pytest.mark.parametrize("query_rank", [None, 6])
def test_merged_maps_give_the_scores_and_outputs(query_rank):
    layer = mla(rotary_dim=0, query_rank=query_rank, latent_norm=False)
    x, merged = torch.randn(1, 6, WIDTH), layer.merged()
    latent = x @ merged.latent
    scores = x[:, None] @ merged.query @ latent[:, None].mT * layer.scale
    torch.testing.assert_close(scores, layer.scores(layer.query(x), layer.keep(x)))
    expected = (torch.softmax(scores, -1) @ latent[:, None] @ merged.output).sum(1)
    torch.testing.assert_close(layer(x), expected)


def test_merged_maps_start_from_the_normed_latent_query():
    layer = mla(query_rank=6)
    x, merged = torch.randn(1, 5, WIDTH), layer.merged()
    assert merged.query.shape == (HEADS, 6, RANK)
    content = layer.query(x)[0][..., : WIDTH // HEADS] @ layer.key.weight.unflatten(0, (HEADS, -1))
    torch.testing.assert_close(layer.latent_query(x)[:, None] @ merged.query, content)


def test_a_rotation_between_the_maps_cannot_be_merged():
    """The reason for columns of their own: rotating the content makes the merged scores wrong by order one."""
    layer = mla(rotary_dim=0, latent_norm=False)
    x = torch.randn(1, 6, WIDTH)
    query, kept = layer.query(x), layer.keep(x)
    q, k = Rope(WIDTH // HEADS, 6).rotate(query[0], layer.expand(kept)[0])
    rotated = q @ k.mT * layer.scale
    assert (rotated - layer.scores(query, kept)).abs().max() > 0.1 * rotated.abs().max()


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="`rank` must be between 1 and `width` = 24, got 25"):
        mla(rank=25)
    with pytest.raises(ValueError, match="`query_rank` must be between 1 and `width` = 24, got 0"):
        mla(query_rank=0)
    with pytest.raises(ValueError, match="`rotary_dim` must be even and at least 0, got 3"):
        mla(rotary_dim=3)
    with pytest.raises(ValueError, match="`rotary_dim` is 0, and Rope has nothing to turn"):
        mla(rotary_dim=0, position=Rope(4, 3))
    with pytest.raises(ValueError, match="got 25 and 3; or give `content_dim`"):
        Mla(Softmax(), 25, 3, 4, rotary_dim=0)
    with pytest.raises(ValueError, match="`attention` ThirdOrder takes 2 keys for every token and Mla makes one"):
        Mla(ThirdOrder(), WIDTH, HEADS, RANK, rotary_dim=0)
