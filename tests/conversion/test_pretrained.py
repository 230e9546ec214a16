"""The exact points of conversions on the pretrained models themselves, in the precision that they are used in."""

import pytest
import torch

from attnlens.conversion.collaborative import collaborative
from attnlens.conversion.extreme import extreme, separate
from attnlens.conversion.joint_svd import joint_svd
from attnlens.conversion.mean_pooling import mean_pooling
from attnlens.conversion.slices import slices, with_slices
from attnlens.conversion.transmla import transmla
from tests.models.pretrained.conftest import minilm, smollm2  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def double():
    """Not here: these are float32 models."""


@pytest.fixture
def ids():
    return torch.randint(1000, 20000, (1, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def change(model, converted, ids):
    """Relative, of the outputs."""
    before = model(ids)
    return float((converted.model(ids) - before).norm() / before.norm())


def test_smollm2_at_the_exact_points(smollm2, ids):  # noqa: F811
    model = smollm2.model
    assert change(model, mean_pooling(model, 3), ids) == 0
    assert change(model, joint_svd(model, 384, ids), ids) < 1e-3
    assert change(model, mean_pooling(model, 1), ids) > 0.1
    stack = slices(model).stack
    assert stack.shape == (30, 32, 576, 192)
    with torch.no_grad():
        assert torch.equal(with_slices(model, stack)(ids), model(ids))


def test_transmla_of_smollm2_loses_the_rotation_and_nothing_else(smollm2, ids):  # noqa: F811
    """Where every position is the same one, full rank on enough tokens is exact."""
    model, rope = smollm2.model, smollm2.model.position
    kept = rope.cos.clone(), rope.sin.clone()
    many = torch.randint(1000, 20000, (16, 32), generator=torch.Generator().manual_seed(1))
    with_rotation = change(model, transmla(model, many, 320), ids)
    try:
        rope.cos.fill_(1)
        rope.sin.fill_(0)
        without = change(model, transmla(model, many, 320), ids)
    finally:
        rope.cos.copy_(kept[0])
        rope.sin.copy_(kept[1])
    assert without < 1e-2 < with_rotation


def test_minilm_at_the_exact_points(minilm, ids):  # noqa: F811
    model = minilm.model
    assert change(model, mean_pooling(model, 12), ids) == 0
    assert change(model, joint_svd(model, 384), ids) < 1e-4
    assert change(model, collaborative(model, 384), ids) < 1e-4
    assert slices(model).stack.shape == (6, 12, 384, 384)


@pytest.mark.slow
def test_minilm_in_full_rank_slices(minilm, ids):  # noqa: F811
    def cut(stack):
        return separate(stack, 384)

    assert change(minilm.model, extreme(minilm.model, cut), ids) < 1e-3
