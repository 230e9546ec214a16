"""Policies inside a decoder: greedy text and beams."""

import pytest
import torch

from attnlens.attention.softmax import Softmax
from attnlens.cache.full import Full
from attnlens.cache.heavy_hitters import HeavyHitters
from attnlens.cache.quantized import Quantized
from attnlens.cache.sliding import Sliding
from attnlens.cache.snapkv import SnapKV
from attnlens.models.block import PreNorm
from attnlens.models.decoder import Decoder
from attnlens.models.embedding import TokenEmbedding
from attnlens.models.generate import beam_search, generate
from attnlens.models.heads import TokenHead
from attnlens.position.rope import Rope
from attnlens.projection.gqa import Gqa

LENGTH = 26


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    position = Rope(8, LENGTH)
    projections = (Gqa(Softmax(), 32, 4, 2, position=position) for _ in range(2))
    blocks = [
        PreNorm(part, torch.nn.Linear(32, 32), [torch.nn.LayerNorm(32) for _ in range(2)]) for part in projections
    ]
    embedding = TokenEmbedding(11, 32, std=1.0)
    return Decoder(embedding, position, blocks, torch.nn.LayerNorm(32), TokenHead(32, 11)).eval()


LOSSLESS = [Sliding(24, 2), HeavyHitters(13, 13), SnapKV(10, 4), Full(Quantized(2, 4, LENGTH))]
LOSSY = [
    Sliding(6, 2),
    HeavyHitters(4, 4),
    SnapKV(6, 3),
    Full(Quantized(2, 4, 3)),
    HeavyHitters(4, 6, Quantized(4, 3, 3)),
]


def beams(decoder, ids, cache):
    state = decoder.init_cache(ids.shape[0], LENGTH, cache=cache)
    return beam_search(decoder.step, state, ids, LENGTH - ids.shape[1], width=3, end=10)


@pytest.mark.parametrize("policy", LOSSLESS, ids=lambda policy: type(policy).__name__)
def test_text_and_beams_are_those_of_the_full_cache_where_nothing_is_lost(decoder, policy):
    ids = torch.randint(0, 10, (2, 10), generator=torch.Generator().manual_seed(1))
    found, expected = (
        generate(decoder.step, decoder.init_cache(2, LENGTH, cache=cache), ids, 16) for cache in (policy, None)
    )
    assert torch.equal(found, expected)
    assert torch.equal(beams(decoder, ids, policy).ids, beams(decoder, ids, None).ids)


@pytest.mark.parametrize("policy", LOSSY, ids=lambda policy: type(policy).__name__)
def test_the_best_beam_of_a_row_does_not_know_of_the_rows_beside_it(decoder, policy):
    """Reordering carries every row's own entries along."""
    ids = torch.randint(0, 10, (3, 10), generator=torch.Generator().manual_seed(2))
    together = beams(decoder, ids, policy)
    for row in range(3):
        alone = beams(decoder, ids[row : row + 1], policy)
        torch.testing.assert_close(together.scores[row : row + 1], alone.scores)
        n = min(together.ids.shape[2], alone.ids.shape[2])
        assert torch.equal(together.ids[row : row + 1, :, :n], alone.ids[:, :, :n])
