"""Rows of one operator in one subject."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.substitution.study import Options, substitute, summarize
from tests.models.test_build import CONF
from tests.substitution.toy import Toy

OPTIONS = Options(budget=0.5, steps=0, learning_rate=0.01, seed=0)


def run(name, subject=None, options=OPTIONS):
    config = OmegaConf.load(CONF / "attention" / f"{name}.yaml")
    return substitute(name, config, subject or Toy(), options, progress=lambda line: None)


@pytest.mark.parametrize("masked", [False, True])
def test_exact_attention_changes_nothing(masked):
    result = run("softmax", Toy("encoder", masked=masked))
    assert result["exact"] == 0
    assert [row["layer"] for row in result["layers"]] == [0, 1]
    assert all(row["value"] < 1e-4 for row in (*result["layers"], *result["cumulative"]))


def test_one_layer_and_all_are_what_a_model_built_so_gives():
    subject = Toy()
    result = run("mean", subject)
    model = subject.model
    for layers, row in [((0,), result["layers"][0]), ((1,), result["layers"][1]), ((0, 1), result["cumulative"][-1])]:
        other = Toy()
        for layer in layers:
            other.model.layers[layer].projection.attention = _mean()
        with torch.no_grad():
            outputs = [other.model(batch.input_ids) for batch in subject.test]
        expected = subject.score([subject.digest(output, place) for place, output in enumerate(outputs)])
        assert row["value"] == pytest.approx(expected)
    assert model is subject.model
    assert run("softmax", subject)["exact"] == 0


def _mean():
    from attnlens.attention.mean import Mean

    return Mean()


def test_the_least_sensitive_layer_goes_first():
    result = run("mean")
    values = [row["value"] for row in result["layers"]]
    assert result["cumulative"][0] == {
        "state": "as is",
        "count": 1,
        "layers": [values.index(min(values))],
        "value": min(values),
    }


def test_what_has_a_fit_is_calibrated_and_what_is_matched_comes_nearer():
    result = run("loki", options=OPTIONS._replace(steps=30))
    assert list(dict.fromkeys(row["state"] for row in result["layers"])) == ["as is", "calibrated", "matched"]
    errors = {
        state: [r["output_error"] for r in result["layers"] if r["state"] == state]
        for state in ("calibrated", "matched")
    }
    assert all(after < before for before, after in zip(errors["calibrated"], errors["matched"], strict=True))
    assert set(summarize(result)) == {"exact", "all layers/as is", "all layers/calibrated", "all layers/matched"}
    assert [row["state"] for row in run("mean")["layers"]] == ["as is"] * 2


@pytest.mark.parametrize(
    ("name", "model", "reason"),
    [("nystromformer", "decoder", "not possible with Nystromformer"), ("third_order", "encoder", "takes 2 keys")],
)
def test_an_operator_that_cannot_serve_says_why(name, model, reason):
    result = run(name, Toy(model))
    assert reason in result["reason"]
    assert result["layers"] == result["cumulative"] == []


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"`budget` must be a fraction in \(0, 1\].*got 2.0"):
        run("mean", options=OPTIONS._replace(budget=2.0))
    with pytest.raises(ValueError, match="`steps` must be at least 0"):
        run("mean", options=OPTIONS._replace(steps=-1))
