"""Replacing a projection for a while, and running from the middle of a model."""

import pytest
import torch

from attnlens.attention.mean import Mean
from attnlens.attention.softmax import Softmax
from attnlens.substitution.swap import counts, residuals, run_from, substituted, with_operator
from tests.substitution.toy import Toy


@pytest.mark.parametrize("model", ["decoder", "encoder"])
@pytest.mark.parametrize("masked", [False, True])
def test_running_from_any_layer_is_the_run(model, masked):
    toy = Toy(model, masked=masked)
    for batch, expected in zip(toy.test, toy.outputs, strict=True):
        for layer, x in enumerate(residuals(toy.model, batch)):
            torch.testing.assert_close(run_from(toy.model, x, layer, batch.mask), expected, rtol=0, atol=0)


def test_a_layer_is_another_one_inside_and_itself_again_afterwards():
    toy = Toy()
    projection = toy.model.layers[1].projection
    other = with_operator(projection, Mean())
    ids = toy.test[0].input_ids
    with pytest.raises(RuntimeError, match="halfway"), substituted(toy.model, {1: other}):
        assert isinstance(toy.model.operators[1], Mean)
        assert isinstance(toy.model.operators[0], Softmax)
        assert not torch.equal(toy.model(ids), toy.outputs[0])
        raise RuntimeError("halfway")
    assert toy.model.layers[1].projection is projection
    assert torch.equal(toy.model(ids), toy.outputs[0])
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), projection.parameters(), strict=True))


def test_counts_double_up_to_all():
    assert list(counts(1)) == [1]
    assert list(counts(6)) == [1, 2, 4, 6]
    assert list(counts(30)) == [1, 2, 4, 8, 16, 30]
