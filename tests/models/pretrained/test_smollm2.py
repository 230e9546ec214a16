"""SmolLM2 in our own classes: the perplexity that transformers finds, decoding, and files that are not it."""

import math
import time

import pytest
import torch
from filelock import FileLock
from torch.nn import functional as F

from attnlens.attention.mean import Mean
from attnlens.attention.softmax import Softmax
from attnlens.models.generate import cache_bytes, generate
from attnlens.models.pretrained.smollm2 import load_smollm2
from tests.models.pretrained.sources import ROOT, fetched


@torch.no_grad()
def perplexity(model, ids):
    logits = model(ids[None])
    return math.exp(F.cross_entropy(logits[0, :-1], ids[1:]).item())


@pytest.fixture(scope="module")
def ids(smollm2, play):
    return torch.tensor(smollm2.tokenizer.encode(play).ids[:512])


def test_its_perplexity_is_the_one_that_transformers_finds(smollm2, ids):
    """17.35926 by transformers 5.23 from the same file, in float32; tests/oracles measures it again."""
    assert abs(perplexity(smollm2.model, ids) - 17.3593) < 1e-4


def test_sizes_and_tied_embeddings(smollm2):
    sizes = smollm2.sizes
    assert (sizes.num_layers, sizes.width, sizes.num_heads, sizes.num_groups) == (30, 576, 9, 3)
    assert smollm2.model.head.linear.weight is smollm2.model.embedding.weight
    assert sum(weight.numel() for weight in smollm2.model.parameters()) == 134_515_008
    assert not any(weight.requires_grad for weight in smollm2.model.parameters())


def test_half_precision_reopens_fast_and_costs_little(ids):
    folder = fetched("smollm2")
    with FileLock(ROOT / "data" / ".pretrained.lock"):
        load_smollm2(folder)
    start = time.process_time()
    model = load_smollm2(folder).model
    assert time.process_time() - start < 2
    assert abs(perplexity(model, ids) / 17.3593 - 1) < 1e-3


def test_token_by_token_equals_one_run(smollm2, ids):
    model, part = smollm2.model, ids[None, :40]
    with torch.no_grad():
        expected = model(part)
        cache, logits = model.init_cache(1, 40), []
        for piece in part.split([30, 1, 1, 8], dim=1):
            cache, out = model.step(cache, piece)
            logits.append(out)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=1e-3)
    # 2 G d_head floats a token and layer.
    assert cache_bytes(cache) == 4 * 30 * 40 * 2 * 3 * 64


def test_it_has_learned_something(smollm2):
    prompt = torch.tensor([smollm2.tokenizer.encode("The capital of France is").ids])
    cache = smollm2.model.init_cache(1, 16)
    assert smollm2.tokenizer.decode(generate(smollm2.model.step, cache, prompt, 1)[0].tolist()) == " Paris"


@pytest.mark.parametrize(
    "text", ["Room 1024, floor 7", "naïve café — “quotes”", "  two  spaces\n\n\ttab", "日本語 🙂", ""]
)
def test_the_tokenizer_is_lossless_and_splits_digits(smollm2, text):
    encoding = smollm2.tokenizer.encode(text)
    assert smollm2.tokenizer.decode(encoding.ids) == text
    digits = [token for token in encoding.tokens if any(symbol.isdigit() for symbol in token)]
    assert all(len(token) == 1 for token in digits)


def test_every_layer_can_have_another_operator(ids):
    folder = fetched("smollm2")
    with FileLock(ROOT / "data" / ".pretrained.lock"):
        model = load_smollm2(folder, operators=lambda layer: Mean() if layer == 3 else Softmax(), max_length=64).model
    assert [type(operator).__name__ for operator in model.operators].count("Mean") == 1
    assert model(ids[None, :8]).isfinite().all()
    with pytest.raises(ValueError, match="`max_length` of Rope is 64, got a sequence of 65 tokens"):
        model(ids[None, :65])


def test_an_unknown_precision_and_a_source_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`precision` is 'double': choose one of"):
        load_smollm2(tmp_path, precision="double")
    with pytest.raises(ValueError, match=r"holds no fetched source: run `python pipelines/fetch\.py source="):
        load_smollm2(tmp_path / "smollm2")
