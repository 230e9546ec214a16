"""Linear biases through two coordinates: the explicit bias, decoding, lengths beyond the trained one, refusals."""

from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention.linear import Linear
from attnlens.attention.softmax import Softmax
from attnlens.models.build import build_model, build_operator
from attnlens.position.alibi import Alibi, slopes
from attnlens.projection.gqa import Gqa
from attnlens.projection.mha import Mha
from attnlens.projection.mla import Mla

CONF = Path(__file__).resolve().parents[2] / "conf"
META = {"data": "toy", "causal": True, "length": 24, "vocabulary_size": 40, "num_outputs": 40}
NAMES = sorted(path.stem for path in (CONF / "attention").glob("*.yaml"))


def config(attention="softmax", model="decoder", projection="mha"):
    groups = {"attention": attention, "projection": projection, "position": "alibi", "model": model}
    return OmegaConf.create({group: OmegaConf.load(CONF / group / f"{name}.yaml") for group, name in groups.items()})


def dense(q, k, v, m, mask=None):
    """Softmax over scores with the bias written out, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    places = torch.arange(q.shape[2], dtype=torch.float64)
    distance = places[:, None] - places
    scores = q @ k.mT * q.shape[-1] ** -0.5 - m.double()[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.softmax(scores, -1) @ v


def test_slopes_are_those_of_the_paper():
    torch.testing.assert_close(slopes(8), 2.0 ** -torch.arange(1, 9, dtype=torch.float64), rtol=0, atol=0)
    assert slopes(1).tolist() == [2.0**-8]
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    torch.testing.assert_close(slopes(6), torch.tensor(expected, dtype=torch.float64))
    assert len(slopes(12)) == 12
    assert len(set(slopes(12).tolist())) == 12


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_softmax_is_that_of_the_explicit_bias(heads, dtype, tolerance):
    q, k, v = torch.randn(3, 2, heads, 70, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    mask = torch.arange(70) < torch.tensor([70, 41])[:, None]
    ours = Softmax()(*Alibi(heads).rotate(q, k), v, causal=True, key_padding_mask=mask)
    torch.testing.assert_close(ours.double(), dense(q, k, v, slopes(heads), mask), rtol=tolerance, atol=tolerance)
    plain = Softmax()(q, k, v, causal=True, key_padding_mask=mask)
    assert (plain - ours).abs().max() > 0.1


@pytest.mark.parametrize("length", [100, 8192])
def test_the_error_of_a_score_is_what_the_docstring_says(length):
    """|s' - s| <= 4 u m max(i, 1) at q = k = 0, and not a hundred times less: the bound is no idle one."""
    zero = torch.zeros(1, 8, length, 16)
    q, k = Alibi(8).rotate(zero, zero)
    rows = torch.tensor([0, 1, length // 3, length - 1])
    scores = (q[0][:, rows] @ k[0].mT).double() / 18**0.5
    m, i, j = slopes(8)[:, None, None], rows[:, None].double(), torch.arange(length).double()
    bound = 4 * 2.0**-24 * m * i.clamp(min=1)
    ratio = (((scores + m * (i - j)).abs() / bound)[:, :, :].masked_fill(j > i, 0)).max()
    assert 0.01 < ratio <= 1


def test_old_keys_fade_and_no_length_is_too_long():
    """At equal scores weights are geometric: what lies L tokens back weighs exp(-m L) in all."""
    alibi, zero = Alibi(2), torch.zeros(1, 2, 3000, 4)
    assert alibi.max_length is None
    weights = Softmax().matrix(*alibi.rotate(zero, zero), causal=True)[0, :, -1].double()
    for m, row in zip(slopes(2), weights, strict=True):
        torch.testing.assert_close(row[:-200].sum(), torch.exp(-200 * m), rtol=1e-3, atol=1e-5)
    model = build_model(config(), META, seed=0)
    assert model(torch.zeros(1, 200, dtype=torch.long)).isfinite().all()


def test_scores_depend_on_the_distance_only():
    """The same tokens at another offset: equal outputs, which decoding and extrapolation rest on."""
    q, k, v = torch.randn(3, 1, 4, 30, 8, dtype=torch.float64)
    first, later = (Softmax()(*Alibi(4).rotate(q, k, offset=start), v, causal=True) for start in (0, 1000))
    torch.testing.assert_close(later, first, rtol=1e-10, atol=1e-10)


@cache
def is_causal(name):
    return build_operator(config(name), META, seed=0).causal


@pytest.mark.parametrize("name", [name for name in NAMES if is_causal(name)])
def test_every_causal_operator_runs_and_decodes_with_it(name):
    """One run equals runs of parts, and nothing sees the future.

    Tokens are distinct: an operator that picks keys by a part of their coordinates (loki) picks among equal tokens by
    chance, and ALiBi weighs them differently.
    """
    model = build_model(config(name), META, seed=0).double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(40, generator=generator)[:24] for _ in range(2)])
    whole, changed = model(ids), ids.clone()
    changed[:, 17:] = (changed[:, 17:] + 1) % 40
    torch.testing.assert_close(model(changed)[:, :17], whole[:, :17], rtol=1e-6, atol=1e-6)
    state, logits = model.init_cache(2, 24), []
    for part in ids.split([9, 1, 14], dim=1):
        state, out = model.step(state, part)
        logits.append(out)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projection", ["gqa", "mqa"])
def test_groups_share_keys_and_heads_keep_their_slopes(projection):
    groups = {"gqa": 2, "mqa": 1}[projection]
    gqa = Gqa(Softmax(), 32, 4, groups, position=Alibi(4)).double()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    q, k, v = gqa._split(*gqa._project(x))
    k, v = (z.repeat_interleave(4 // groups, 1) for z in (k, v))
    torch.testing.assert_close(gqa(x, causal=True), gqa._merge(dense(q, k, v, slopes(4))))


def test_gradients_are_those_of_the_bias_written_out():
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours = torch.autograd.grad(Softmax()(*Alibi(2).rotate(q, k), v, causal=True).square().sum(), (q, k, v))
    expected = torch.autograd.grad(dense(q, k, v, slopes(2)).square().sum(), (q, k, v))
    torch.testing.assert_close(ours, expected)


def test_what_it_cannot_do_is_refused_with_the_remedy():
    x = torch.zeros(1, 5, 16)
    with pytest.raises(ValueError, match=r"`position` Alibi needs causal attention.*position=rope"):
        Mha(Softmax(), 16, 2, position=Alibi(2))(x)
    with pytest.raises(ValueError, match=r"`position` Alibi needs causal attention.*model=decoder"):
        build_model(config(model="encoder"), META | {"causal": False}, seed=0)
    with pytest.raises(ValueError, match=r"`position` Alibi widens.*Mla.*projection=mha"):
        Mla(Softmax(), 16, 2, rank=4, rotary_dim=2, position=Alibi(2))
    with pytest.raises(ValueError, match=r"`num_heads` of Alibi is 4, got queries of 2"):
        Mha(Softmax(), 16, 2, position=Alibi(4))(x, causal=True)
    with pytest.raises(ValueError, match=r"`q` is torch.bfloat16.*float32"):
        Mha(Linear(), 16, 2, position=Alibi(2)).bfloat16()(x.bfloat16(), causal=True)
    with pytest.raises(ValueError, match=r"`num_heads` must be at least 1, got 0"):
        Alibi(0)
