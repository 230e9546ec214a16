"""Keys and values from one latent."""

import pytest
import torch

from attnlens.conversion.base import inputs
from attnlens.conversion.joint_svd import joint_svd, truncated
from tests.conversion.models import GROUPS, WIDTH, decoder, encoder, ids


@pytest.mark.parametrize("model", [encoder(), decoder()])
@pytest.mark.parametrize("aware", [False, True])
def test_full_rank_is_exact(model, aware):
    converted = joint_svd(model, WIDTH, ids() if aware else None)
    torch.testing.assert_close(converted.model(ids(seed=1)), model(ids(seed=1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_it_is_the_best_of_its_rank(rank):
    """Eckart and Young, for the weights and for the outputs on the activations; the latter beats the former there."""
    weight, x = torch.randn(12, 20), torch.randn(50, 12) * torch.logspace(-2, 1, 12)
    down, up = truncated(weight, rank)
    tail = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
    torch.testing.assert_close((down @ up - weight).norm(), tail)
    aware_down, aware_up = truncated(weight, rank, x)
    tail = torch.linalg.svdvals(x @ weight)[rank:].square().sum().sqrt()
    error = (x @ aware_down @ aware_up - x @ weight).norm()
    torch.testing.assert_close(error, tail, rtol=1e-5, atol=1e-6)
    assert error < (x @ down @ up - x @ weight).norm()


def test_keys_and_values_have_the_rank_and_what_is_kept_is_counted():
    model = decoder()
    converted = joint_svd(model, 5, ids())
    projection = converted.model.layers[0].projection
    joint = torch.cat([linear.weight for linear in list(projection.inputs)[1:]])
    assert torch.linalg.matrix_rank(joint) == 5
    grouped = 2 * GROUPS * 4
    assert converted.cache == 5
    assert converted.parameters == 5 * (WIDTH + grouped) / (WIDTH * grouped)


def test_activations_are_what_the_projections_read():
    model = decoder()
    found = inputs(model, ids())
    seen = []
    model.layers[1].projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids())
    torch.testing.assert_close(found[1], seen[0].flatten(0, 1))


@pytest.mark.parametrize("rank", [0, 25])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=f"`rank` must be between 1 and 24, where it is exact, got {rank}"):
        joint_svd(decoder(), rank)
