"""Every file of conf/projection in whole models: operators, positions, decoding, attention to a memory, the cache."""

import pytest
import torch

from attnlens.cache.full import Full
from attnlens.models.build import build_model
from attnlens.models.generate import beam_search, generate
from tests.models import test_build

PROJECTIONS = sorted(path.stem for path in (test_build.CONF / "projection").glob("*.yaml"))
META = {**test_build.META, "target_length": 9}


def config(projection, attention="softmax", position="none", model="decoder"):
    return test_build.config(attention, position, model, projection=projection)


def ids():
    return torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))


# An exact one, recurrent ones (one that is built for the width of its keys), and ones that read the whole prefix.
@pytest.mark.parametrize("attention", ["softmax", "linear", "gla", "window", "performer", "retention"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_decoding_equals_one_run(projection, attention):
    position = "sinusoidal" if projection == "collaborative" else "rope"
    model = build_model(config(projection, attention, position), META, seed=0).double()
    cache, logits = model.init_cache(2, 12), []
    for part in ids().split([5, 1, 6], dim=1):
        cache, out = model.step(cache, part)
        logits.append(out)
    # Operators with a state keep some of it in float32.
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["nystromformer", "reformer"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_bidirectional_operators_run(projection, attention):
    model = build_model(config(projection, attention, model="encoder"), META, seed=0)
    assert model(ids()).isfinite().all()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_attention_to_a_memory_token_by_token_equals_one_run(projection):
    position = "sinusoidal" if projection == "collaborative" else "rope"
    model = build_model(config(projection, position=position, model="seq2seq"), META, seed=0).double()
    target, mask = ids()[:, :9], torch.arange(12) < torch.tensor([[12], [5]])
    cache, logits = model.init_cache(ids(), 9, key_padding_mask=mask), []
    for part in target.split([4, 1, 4], dim=1):
        cache, out = model.step(cache, part)
        logits.append(out)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids(), target_ids=target, key_padding_mask=mask))


@pytest.mark.parametrize("attention", ["softmax", "linear", "window"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_beams_reorder_the_cache(projection, attention):
    """The score of the best hypothesis is that which one run gives it, and a beam of one is the greedy answer."""
    model, prompt = build_model(config(projection, attention), META, seed=0).double().eval(), ids()[:, :4]
    beams = beam_search(model.step, model.init_cache(2, 12), prompt, 6, width=3, end=10)
    for row in range(2):
        found = beams.ids[row, 0]
        scored = found[: int((found != 10).sum()) + 1]  # up to the end token
        log = model(torch.cat([prompt[row], scored])[None])[0, 3:-1].log_softmax(-1)
        expected = log.gather(-1, scored[:, None]).sum()
        torch.testing.assert_close(beams.scores[row, 0].double(), expected, rtol=1e-5, atol=1e-5)
    greedy = generate(model.step, model.init_cache(2, 12), prompt, 6)
    for count in range(6):
        so_far = torch.cat([prompt, greedy[:, :count]], 1)
        assert torch.equal(model(so_far)[:, -1].argmax(-1), greedy[:, count])


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_loss_moves_every_weight(projection):
    model = build_model(config(projection), META, seed=0)
    model(ids()).square().sum().backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not still


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal", "rope"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_positions_are_taken_or_refused(projection, position):
    if projection == "collaborative" and position == "rope":
        with pytest.raises(ValueError, match="`position` Rope rotates"):
            build_model(config(projection, position=position), META, seed=0)
        return
    model = build_model(config(projection, position=position), META, seed=0)
    swapped = ids()[:, [1, 0, *range(2, 12)]]
    moved = (model(swapped)[:, -1] - model(ids())[:, -1]).abs().max()
    # Two layers of causal attention tell the order apart even without positions: only softly here, at first weights.
    assert moved > (1e-3 if position == "rope" else 0)


# Floats a token and layer, by the formulas of the papers, at width 64 with 2 heads of 32.
FLOATS = {
    "mha": 2 * 64,
    "gqa": 2 * 32,
    "mqa": 2 * 32,
    "mla": 32 + 16,
    "tpa": (2 + 2) * (2 + 32),
    "collaborative": 32 + 64,
}


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_cache_holds_what_the_papers_say(projection):
    model = build_model(config(projection), META, seed=0)
    cache, _ = model.step(model.init_cache(2, 12), ids())
    for layer in cache.layers:
        assert Full().num_bytes(layer.own.state) == 4 * 2 * 12 * FLOATS[projection]
