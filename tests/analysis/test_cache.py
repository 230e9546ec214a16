"""Errors and bytes of caches on captured tensors: limits, orders, and decoding with a model."""

import math

import pytest
import torch

from attnlens.analysis.cache import Source, compare, decoded, decoded_loss, ladder, read_source, summarize
from attnlens.attention.softmax import Softmax
from attnlens.cache.full import Full
from attnlens.cache.sliding import Sliding
from attnlens.linalg.dense import softmax_naive
from attnlens.linalg.suffix import repeat_groups
from attnlens.models.block import PreNorm
from attnlens.models.decoder import Decoder
from attnlens.models.embedding import TokenEmbedding
from attnlens.models.heads import TokenHead
from attnlens.position.rope import Rope
from attnlens.projection.gqa import Gqa

SETTINGS = {"fractions": [0.25, 0.5], "bits": [2, 8], "prompt": 0.5}


@pytest.fixture
def source():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, heads, 32, 8, generator=generator) for heads in (4, 2, 2))
    return Source({"source": "drawn"}, q, k, v)


def test_decoded_outputs_are_the_last_rows_of_a_causal_run(source):
    _, q, k, v = source
    out, num_bytes = decoded(Full(), q, k, v, prompt=12)
    torch.testing.assert_close(out, softmax_naive(q, *(repeat_groups(x, 4) for x in (k, v)), causal=True)[:, :, 12:])
    assert num_bytes == 2 * 2 * 32 * (8 + 8) * 4


def test_every_rung_is_measured_and_the_oracle_is_below_the_policies(source):
    rows = compare(source, SETTINGS, progress=lambda _: None)
    assert len(rows) == (1 + 3 * 2) * 3 + 2
    found = {(row["policy"], row["budget"], row["bits"]): row for row in rows}
    assert max(found["full", None, None]["error"]) < 1e-6
    for (policy, budget, bits), row in found.items():
        assert row["bytes"] > 0
        assert len(row["error"]) == 4
        if bits == 8 and policy != "full":
            plain = found[policy, budget, None]["error"]
            assert all(abs(a - b) < 0.05 for a, b in zip(row["error"], plain, strict=True))
        if budget is not None and policy not in ("oracle", "snapkv"):
            best = found["oracle", budget, None]["error"]
            assert all(a > b for a, b in zip(row["error"], best, strict=True))
    # A prompt of 16 with a budget of 16 loses nothing.
    assert max(found["snapkv", 16, None]["error"]) < 1e-6
    summary = summarize({"rows": rows})
    assert len(summary) == len(rows)
    assert summary["drawn/full/None/2"] > summary["drawn/full/None/8"] > summary["drawn/full/None/full"]


def test_a_budget_of_less_than_two_entries_and_a_missing_capture_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`fractions` 0.05 of 32 tokens is less than two entries: raise it"):
        list(ladder(32, [0.05], []))
    with pytest.raises(ValueError, match=r"`capture` none.safetensors is missing"):
        read_source(tmp_path / "none.safetensors")


def model():
    torch.manual_seed(0)
    position = Rope(8, 24)
    projections = (Gqa(Softmax(), 32, 4, 2, position=position) for _ in range(2))
    blocks = [
        PreNorm(part, torch.nn.Linear(32, 32), [torch.nn.LayerNorm(32) for _ in range(2)]) for part in projections
    ]
    return Decoder(TokenEmbedding(11, 32), position, blocks, torch.nn.LayerNorm(32), TokenHead(32, 11))


def test_the_loss_of_decoding_is_that_of_one_run_where_nothing_is_dropped():
    decoder, ids = model().double(), torch.randint(0, 11, (3, 24))
    logits = decoder(ids)[:, 7:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 8:].flatten()).item()
    assert math.isclose(decoded_loss(decoder, ids, Full(), prompt=8), expected, rel_tol=1e-6)
    assert math.isclose(decoded_loss(decoder, ids, Sliding(24), prompt=8), expected, rel_tol=1e-6)
    assert not math.isclose(decoded_loss(decoder, ids, Sliding(2, 0), prompt=8), expected, rel_tol=1e-3)
