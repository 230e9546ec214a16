"""Affine maps of each head's tokens."""

import pytest
import torch

from attnlens.linalg.head_map import HeadMap, gaussian_map


def test_each_head_has_its_own_map():
    generator = torch.Generator().manual_seed(0)
    built = gaussian_map(3, 4, 2, generator, bias=1.5)
    x = torch.randn(2, 3, 5, 4, generator=generator)
    for h in range(3):
        expected = torch.einsum("bnd,de->bne", x[:, h], built.weight[h]) + 1.5
        torch.testing.assert_close(built(x)[:, h], expected)
    assert not torch.equal(built.weight[0], built.weight[1])


def test_unit_gaussian_tokens_give_unit_gaussian_outputs():
    generator = torch.Generator().manual_seed(0)
    out = gaussian_map(1, 64, 500, generator)(torch.randn(1, 1, 200, 64, generator=generator))
    assert abs(out.std().item() - 1) < 0.05


def test_other_heads_than_it_was_built_for_are_refused():
    built = HeadMap(torch.zeros(3, 4, 1), torch.zeros(3, 1, 1))
    for shape in ((2, 2, 5, 4), (2, 3, 5, 6)):
        with pytest.raises(ValueError, match="`num_heads` and `head_dim`"):
            built(torch.zeros(shape))
