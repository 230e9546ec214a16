"""Models from the files of conf/: equal starting weights, decoding, refusals."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.models.build import build_model, build_operator, refusal, seeded

CONF = Path(__file__).resolve().parents[2] / "conf"
META = {"data": "toy", "causal": False, "length": 12, "vocabulary_size": 11, "num_outputs": 11}


def config(attention="softmax", position="none", model="encoder", *, projection="mha", changes=None):
    groups = {"attention": attention, "projection": projection, "position": position, "model": model}
    loaded = OmegaConf.create({group: OmegaConf.load(CONF / group / f"{name}.yaml") for group, name in groups.items()})
    return OmegaConf.merge(loaded, OmegaConf.create(changes or {}))


def weights(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".attention." not in name}


@pytest.mark.parametrize("other", ["performer", "mean", "random_keys"])
def test_two_operators_start_from_equal_weights(other):
    ours, theirs = weights(build_model(config(), META, seed=3)), weights(build_model(config(other), META, seed=3))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_seeds_differ_and_repeat_and_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, two = (weights(build_model(config("performer"), META, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], two["embedding.weight"])


def test_layers_draw_their_own_operator():
    first, second = build_model(config("random_keys"), META, seed=0).operators
    q = torch.randn(1, 2, 12, 32)
    assert not torch.equal(first.matrix(q, q), second.matrix(q, q))


@pytest.mark.parametrize("position", ["none", "sinusoidal", "learned", "rope"])
@pytest.mark.parametrize("taps", [None, 3])
def test_decoding_equals_one_run(position, taps):
    model = build_model(
        config(position=position, model="decoder", changes={"projection": {"short_convolution": taps}}), META, seed=0
    )
    ids = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    cache, logits = model.init_cache(2, 12), []
    for part in ids.split([5, 1, 6], dim=1):
        cache, out = model.step(cache, part)
        logits.append(out)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), rtol=1e-4, atol=1e-5)


def test_a_decoder_does_not_look_ahead_and_an_encoder_does():
    ids = torch.randint(11, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    decoder, encoder = (build_model(config(model=name), META, seed=0) for name in ("decoder", "encoder"))
    assert torch.equal(decoder(ids)[:, :-1], decoder(changed)[:, :-1])
    assert not torch.equal(encoder(ids)[:, :-1], encoder(changed)[:, :-1])


def test_every_part_can_be_exchanged_by_its_target():
    blocks = "attnlens.models.block.PostNorm"
    changes = {
        "block": {"_target_": blocks, "dropout": 0.1},
        "norm": {"_target_": "torch.nn.RMSNorm"},
        "mlp": {"_target_": "attnlens.models.mlp.SwigluMlp"},
        "head": {"_target_": "attnlens.models.heads.PooledHead"},
    }
    model = build_model(config(changes={"model": changes}), META, seed=0)
    assert model(torch.zeros(3, 12, dtype=torch.int64)).shape == (3, 11)
    assert isinstance(model.norm, torch.nn.Identity)
    assert sum(isinstance(module, torch.nn.RMSNorm) for module in model.modules()) == 4


def test_rotary_positions_are_shared_and_hold_no_weights():
    model = build_model(config(position="rope"), META, seed=0)
    assert all(block.projection.position is model.position for block in model.blocks)
    assert not any("position" in name for name in model.state_dict())


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match=r"`model.width` must be a multiple of `model.num_heads`, got 64, 3"):
        build_model(config(changes={"model": {"num_heads": 3}}), META, seed=0)
    with pytest.raises(ValueError, match=r"`model` is Encoder.*toy.*`model=decoder`"):
        build_model(config(), {**META, "causal": True}, seed=0)
    with pytest.raises(ValueError, match="`taps` is not an argument of Mha"):
        build_model(config(changes={"projection": {"taps": 3}}), META, seed=0)


def test_an_operator_that_cannot_be_causal_says_why():
    operator = build_operator(config("nystromformer"), META, seed=0)
    assert refusal(operator, causal=False) is None
    reason = refusal(operator, causal=True)
    assert reason is not None
    assert "`causal=True` is not possible with Nystromformer" in reason
    assert refusal(build_operator(config("softmax"), META, seed=0), causal=True) is None


def test_seeded_leaves_the_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with seeded(9):
        torch.rand(100)
    assert torch.equal(torch.rand(1), expected)
