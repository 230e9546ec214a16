"""Canonical polyadic decompositions of the heads' maps."""

import pytest
import torch

from attnlens.conversion.collaborative import collaborative, decompose
from attnlens.projection.collaborative import Collaborative
from tests.conversion.models import HEADS, WIDTH, decoder, encoder, ids


def test_full_rank_is_exact_with_biases():
    model = encoder()
    assert model.layers[0].projection.inputs[0].bias.abs().max() > 0
    converted = collaborative(model, WIDTH)
    assert isinstance(converted.model.layers[0].projection, Collaborative)
    torch.testing.assert_close(converted.model(ids()), model(ids()))
    assert converted.cache == WIDTH + HEADS + WIDTH


def test_a_stack_of_rank_five_is_nearly_found_at_rank_five():
    """Heads that weigh the same five columns; alternating least squares creep near the end."""
    q, k, mixing = torch.randn(12, 5), torch.randn(12, 5), torch.rand(4, 5) + 0.5
    query, key = q * mixing[:, None], k.expand(4, 12, 5)
    before, after = (decompose(query, key, 5, iterations=count)[1] for count in (0, 200))
    assert after < before / 10


def test_the_error_falls_with_the_rank_and_least_squares_beat_the_start():
    query, key = torch.randn(4, 16, 4), torch.randn(4, 16, 4)
    errors = [decompose(query, key, rank, iterations=20)[1] for rank in (2, 6, 10, 14, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12
    assert decompose(query, key, 6, iterations=20)[1] < decompose(query, key, 6, iterations=0)[1]


def test_what_cannot_be_converted_says_what_can():
    with pytest.raises(ValueError, match=r"`model` turns queries and keys by Rope.*use transmla"):
        collaborative(decoder(), 4)
    with pytest.raises(ValueError, match="`rank` must be between 1 and 24"):
        collaborative(encoder(), 25)
    model = decoder()
    for block in model.layers:
        block.projection.position = None
    with pytest.raises(ValueError, match="`model` has 3 key heads for 6"):
        collaborative(model, 4)
