"""Pooling heads to groups."""

import pytest
import torch

from attnlens.conversion.mean_pooling import mean_pooling
from attnlens.projection.gqa import Gqa
from tests.conversion.models import GROUPS, HEADS, WIDTH, decoder, encoder, ids


@pytest.mark.parametrize("model", [encoder(), decoder()])
def test_as_many_groups_change_nothing(model):
    groups = model.layers[0].projection.num_groups
    converted = mean_pooling(model, groups)
    torch.testing.assert_close(converted.model(ids()), model(ids()))
    assert converted.parameters == 1.0


@pytest.mark.parametrize("model", [encoder(), decoder()])
def test_groups_that_agree_are_pooled_exactly(model):
    """Biases included."""
    for block in model.layers:
        for linear in list(block.projection.inputs)[1:]:
            rows = linear.weight.data.unflatten(0, (block.projection.num_groups, -1))
            rows.copy_(rows[:1].clone().expand_as(rows))
            if linear.bias is not None:
                bias = linear.bias.data.unflatten(0, (block.projection.num_groups, -1))
                bias.copy_(bias[:1].clone().expand_as(bias))
    converted = mean_pooling(model, 1)
    torch.testing.assert_close(converted.model(ids()), model(ids()))
    assert isinstance(converted.model.layers[0].projection, Gqa)
    assert converted.cache == 2 * WIDTH // HEADS


def test_a_group_is_the_mean_of_its_neighbors_and_the_model_given_stays():
    model = encoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pooled = mean_pooling(model, 2).model.layers[1].projection.inputs[1].weight
    heads = model.layers[1].projection.inputs[1].weight.unflatten(0, (HEADS, -1))
    torch.testing.assert_close(pooled.unflatten(0, (2, -1))[1], heads[3:].mean(0))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_groups_that_do_not_divide_and_odd_projections_are_refused():
    with pytest.raises(ValueError, match=f"`num_groups` must divide the {GROUPS} of the model, got 2"):
        mean_pooling(decoder(), 2)
    model = encoder()
    model.layers[1].projection.convolutions = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(ValueError, match="`model` has a Mha that cannot be converted"):
        mean_pooling(model, 2)
