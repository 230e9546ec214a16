"""What every conversion leaves alone: the model that it was given."""

from functools import partial

import pytest
import torch
from torch import nn

from attnlens.attention.softmax import Softmax
from attnlens.conversion.collaborative import collaborative
from attnlens.conversion.extreme import extreme, separate
from attnlens.conversion.joint_svd import joint_svd
from attnlens.conversion.mean_pooling import mean_pooling
from attnlens.conversion.transmla import transmla
from attnlens.conversion.trawl import trawl
from tests.conversion.models import decoder, encoder, ids


@pytest.mark.parametrize(
    ("model", "convert"),
    [
        (decoder(), partial(mean_pooling, num_groups=1)),
        (decoder(), partial(transmla, ids=ids(), rank=4)),
        (decoder(), partial(joint_svd, rank=4)),
        (encoder(), partial(collaborative, rank=6)),
        (encoder(), partial(extreme, cut=partial(separate, rank=3))),
        (encoder(), partial(trawl, rank=2)),
    ],
)
def test_nothing_is_shared_with_the_model_nor_changed_in_it(model, convert):
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    converted = convert(model).model
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    # Operators and positions may have weights or a state of their own.
    assert not {id(module) for module in model.modules()} & {id(module) for module in converted.modules()}
    addresses = [{weight.data_ptr() for weight in each.parameters()} for each in (model, converted)]
    assert not addresses[0] & addresses[1]


def test_projections_of_another_kind_are_refused():
    model = decoder()
    model.layers[1].projection = nn.Identity()
    with pytest.raises(ValueError, match="`model` has a Identity that cannot be converted"):
        joint_svd(model, 4)
    convolved = decoder()
    convolved.layers[0].projection = type(convolved.layers[0].projection)(Softmax(), 24, 6, 3, packed=True)
    with pytest.raises(ValueError, match="`model` has a Gqa that cannot be converted"):
        mean_pooling(convolved, 1)
