"""An encoder-decoder from one block: what it sees, token by token, and its refusals."""

import pytest
import torch

from attnlens.models.block import PreNorm
from attnlens.models.build import build_model, runs_causally
from attnlens.models.decoder import Decoder
from attnlens.models.seq2seq import Seq2Seq
from tests.models.test_build import META, config

PAIR = {**META, "causal": True, "target_length": 9, "num_outputs": 7}


def seq2seq(attention="softmax", position="rope", projection="mha", **changes):
    made = config(attention, position, "seq2seq", projection=projection, changes={"model": changes})
    return build_model(made, PAIR, seed=0).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(11, (2, 12), generator=generator), torch.randint(7, (2, 9), generator=generator)


@pytest.mark.parametrize("block", ["PreNorm", "PostNorm", "PeriNorm"])
@pytest.mark.parametrize(("attention", "projection"), [("softmax", "mha"), ("linear", "mqa"), ("window", "gqa")])
def test_decoding_equals_one_run(batch, block, attention, projection):
    model = seq2seq(attention, projection=projection, block={"_target_": f"attnlens.models.block.{block}"})
    source, target = batch
    mask = torch.arange(12) < torch.tensor([[12], [5]])
    cache, logits = model.init_cache(source, 9, key_padding_mask=mask), []
    for part in target.split([4, 1, 4], dim=1):
        cache, out = model.step(cache, part)
        logits.append(out)
    expected = model(source, target_ids=target, key_padding_mask=mask)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, 9, 7)


def test_the_source_is_seen_whole_the_target_only_so_far_and_padding_never(batch):
    model = seq2seq()
    source, target = batch
    out = model(source, target_ids=target)
    later = target.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 7
    assert torch.equal(model(source, target_ids=later)[:, :5], out[:, :5])
    changed = source.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    assert not torch.isclose(model(changed, target_ids=target)[:, 0], out[:, 0]).all()
    mask = (torch.arange(12) < 11).expand(2, 12)
    masked = [model(ids, target_ids=target, key_padding_mask=mask) for ids in (source, changed)]
    torch.testing.assert_close(*masked)


def test_an_operator_that_cannot_be_causal_serves_the_encoder_alone():
    """With a causal one named for the decoder; without, building says so only when it runs, as for any decoder."""
    changes = {"decoder_attention": {"_target_": "attnlens.attention.softmax.Softmax"}}
    model = seq2seq("nystromformer", **changes)
    kinds = [type(operator).__name__ for operator in model.operators]
    assert kinds == ["Nystromformer"] * 2 + ["Softmax"] * 2
    assert not runs_causally(config("nystromformer", model="seq2seq", changes={"model": changes}))
    assert runs_causally(config("nystromformer", model="seq2seq"))


def test_operators_of_all_parts_draw_their_own():
    model = seq2seq("performer", cross_attention=None)
    crossed = [block.cross.attention for block in model.decoder.layers]
    draws = [next(iter(operator.buffers())) for operator in (*model.operators, *crossed)]
    assert len(draws) == 6
    assert not any(torch.equal(a, b) for place, a in enumerate(draws) for b in draws[:place])


def test_a_decoder_without_memory_is_refused():
    parts = build_model(config(model="decoder"), META, seed=0)
    assert isinstance(parts, Decoder)
    assert isinstance(parts.layers[0], PreNorm)
    with pytest.raises(ValueError, match="`decoder` has blocks without `cross`"):
        Seq2Seq(build_model(config(), META, seed=0), parts)
