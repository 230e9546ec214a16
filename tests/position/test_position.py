"""Position encodings: what is added, what is rotated, what is refused."""

import pytest
import torch

from attnlens.position.grid import Grid
from attnlens.position.learned import Learned
from attnlens.position.none import NoPosition
from attnlens.position.rope import Rope
from attnlens.position.sinusoidal import Sinusoidal


@pytest.fixture(autouse=True)
def double(monkeypatch):
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("head_dim", [2, 8])
def test_rope_scores_depend_on_the_distance_only(head_dim):
    rope = Rope(head_dim, max_length=50)
    a, b = torch.randn(2, 1, 1, 1, head_dim).expand(2, 1, 1, 20, head_dim)
    q, k = rope.rotate(a, b)
    scores = (q @ k.mT)[0, 0]
    for distance in (-19, -3, 0, 1, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert scores.diagonal(1)[0] != scores.diagonal(7)[0]


def test_rope_keeps_norms_and_leaves_the_first_token():
    q, k = torch.randn(2, 2, 3, 9, 6)
    rotated, _ = Rope(6, max_length=9).rotate(q, k)
    torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotated[:, :, 0], q[:, :, 0])


def test_rope_with_an_offset_continues_a_sequence():
    q, k = torch.randn(2, 1, 2, 9, 4)
    rope = Rope(4, max_length=9)
    whole = rope.rotate(q, k)
    parts = [rope.rotate(q[:, :, part], k[:, :, part], offset=part.start) for part in (slice(0, 4), slice(4, 9))]
    for index in range(2):
        torch.testing.assert_close(torch.cat([part[index] for part in parts], dim=2), whole[index])


def test_rope_needs_pairs():
    with pytest.raises(ValueError, match=r"`head_dim` must be even.*5"):
        Rope(5, max_length=8)


@pytest.mark.parametrize(
    "make", [lambda: Sinusoidal(6, 10), lambda: Learned(6, 10, std=1.0), lambda: Grid(6, 10, 4, std=1.0)]
)
def test_embedding_adds_a_vector_that_depends_on_the_place_only(make):
    position = make()
    x = torch.randn(2, 10, 6)
    added = position.embed(x) - x
    torch.testing.assert_close(added[0], added[1])
    torch.testing.assert_close(position.embed(x[:, 3:7], offset=3) - x[:, 3:7], added[:, 3:7])
    assert torch.cdist(added[0], added[0]).fill_diagonal_(1).min() > 1e-3


def test_sinusoids_are_those_of_the_paper():
    table = Sinusoidal(4, 10, base=100.0, scale=2.0).table
    expected = [2 * torch.tensor(7.0).sin(), 2 * torch.tensor(7.0).cos(), 2 * torch.tensor(0.7).sin()]
    torch.testing.assert_close(table[7, :3], torch.stack(expected))
    assert Sinusoidal(5, 10).table.shape == (10, 5)


@pytest.mark.parametrize(
    "make", [lambda: Sinusoidal(4, 8), lambda: Learned(4, 8), lambda: Rope(4, 8), lambda: Grid(4, 8, 3)]
)
def test_a_sequence_that_is_too_long_is_refused(make):
    position, x = make(), torch.zeros(1, 2, 9, 4)
    with pytest.raises(ValueError, match=r"`max_length` of \w+ is 8, got a sequence of 9"):
        position.rotate(x, x)
        position.embed(x[0])


def test_a_grid_adds_one_vector_of_the_row_and_one_of_the_column():
    position = Grid(6, 10, 4, std=1.0)
    added = (position.embed(torch.zeros(1, 10, 6)))[0]
    torch.testing.assert_close(added[9] - added[8], added[1] - added[0])
    torch.testing.assert_close(added[7] - added[3], added[4] - added[0])
    assert sum(x.numel() for x in position.parameters()) == (3 + 4) * 6
    assert abs(Grid(500, 400, 20, std=0.3).embed(torch.zeros(1, 400, 500)).std() - 0.3) < 0.01
    with pytest.raises(ValueError, match="`num_columns` must be at least 1, got 0"):
        Grid(6, 10, 0)


def test_no_position_is_the_identity_at_any_length():
    x = torch.randn(1, 1000, 3)
    assert NoPosition().embed(x) is x
    assert not NoPosition().rotates
