"""Residues on circles: adding residues turns the vectors."""

import pytest
import torch

from attnlens.models.cyclic import CyclicEmbedding


def test_adding_a_residue_multiplies_the_complex_coordinates():
    embedding = CyclicEmbedding(53, 12, std=0.5)
    cos, sin = embedding(torch.arange(53)[None])[0].double().chunk(2, -1)
    z = torch.complex(cos, sin) / 0.5**0.5
    x, y = torch.arange(53)[:, None], torch.arange(53)
    torch.testing.assert_close(z[x] * z[y], z[(x + y) % 53], atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding.weight.square().mean(), torch.tensor(0.25))
    assert embedding.weight.requires_grad


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="`width` must be even"):
        CyclicEmbedding(53, 7)
