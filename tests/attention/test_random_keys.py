"""The sampling null: its reservoir is uniform and blind to the future, its output is softmax over the members."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build
from attnlens.attention.random_keys import ROWS, RandomKeys, reservoir
from attnlens.testing.inputs import gaussian


def members_naive(uniform, num_keys):
    """Vitter's algorithm R, one token at a time."""
    slots, history = [], []
    for i, u in enumerate(uniform.tolist()):
        if i < num_keys:
            slots.append(i)
        elif (slot := int(u * (i + 1))) < num_keys:
            slots[slot] = i
        history.append(list(slots))
    return history


def test_reservoir_equals_the_loop():
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for num_keys in (1, 3, 50, 60):
        found = reservoir(uniform, num_keys)
        for row, expected in zip(found.tolist(), members_naive(uniform, num_keys), strict=True):
            assert [j for j in row if j >= 0] == expected


def test_every_past_token_is_equally_likely():
    """2000 reservoirs of 4 after 20 tokens: each token is in with probability 1/5, within five standard errors."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(20)
    for _ in range(2000):
        counts[reservoir(torch.rand(20, generator=generator), 4)[-1]] += 1
    assert ((counts / 2000 - 0.2).abs() < 5 * (0.2 * 0.8 / 2000) ** 0.5).all()


@pytest.mark.parametrize("length", [20, ROWS + 9])
def test_causal_rows_are_softmax_over_their_members(length):
    q, k, v = gaussian(length, batch=1)
    operator = RandomKeys(num_keys=5, max_length=length, seed=3).double()
    members = reservoir(operator.uniform, 5)
    out = operator(q, k, v, causal=True)
    for i in (0, 3, length - 1):
        index = members[i][members[i] >= 0]
        scores = (q[:, :, i : i + 1] @ k[:, :, index].mT) * q.shape[-1] ** -0.5
        torch.testing.assert_close(out[:, :, i : i + 1], torch.softmax(scores, -1) @ v[:, :, index], rtol=0, atol=1e-12)


def test_a_length_beyond_the_draw_names_the_remedy():
    operator = build(OmegaConf.load("conf/attention/random_keys.yaml"), head_dim=8, num_heads=2, max_length=16)
    with pytest.raises(ValueError, match="length 17 is beyond `max_length`=16"):
        operator(*gaussian(17))
