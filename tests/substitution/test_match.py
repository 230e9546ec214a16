"""Matching a layer to exact attention."""

import pytest
import torch

from attnlens.attention.mean import Mean
from attnlens.attention.performer import Performer
from attnlens.attention.softmax import Softmax
from attnlens.projection.mha import Mha
from attnlens.substitution.match import Example, match, relative_error


@pytest.fixture
def exact():
    torch.manual_seed(0)
    return Mha(Softmax(), 16, 2).eval()


def examples(exact, *, masked=False, count=3):
    mask = (torch.arange(10) < torch.tensor([[10], [6]])) if masked else None
    xs = [torch.randn(2, 10, 16) * 3 for _ in range(count)]
    with torch.no_grad():
        return [Example(x, mask, exact(x, causal=True, key_padding_mask=mask)) for x in xs]


def around(exact, operator):
    layer = Mha(operator, 16, 2)
    layer.load_state_dict({n: t for n, t in exact.state_dict().items() if ".attention." not in n}, strict=False)
    return layer.eval()


@pytest.mark.parametrize("masked", [False, True])
def test_it_comes_nearer_and_leaves_the_start_alone(exact, masked):
    data, start = examples(exact, masked=masked), around(exact, Performer(32, 8, 2, seed=0))
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    found = match(start, data, causal=True, steps=60, learning_rate=0.01)
    assert found.before == relative_error(start, data, causal=True)
    assert found.after == pytest.approx(relative_error(found.projection, data, causal=True))
    assert found.after < 0.8 * found.before
    assert all(torch.equal(before[name], tensor) for name, tensor in start.state_dict().items())


def test_what_is_exact_stays_so_and_a_rate_that_destroys_changes_nothing(exact):
    data = examples(exact)
    assert match(around(exact, Softmax()), data, causal=True, steps=5, learning_rate=10.0).after < 1e-10
    start = around(exact, Mean())
    found = match(start, data, causal=True, steps=5, learning_rate=1e6)
    assert found.after == found.before


def test_padding_is_not_matched(exact):
    """Outputs of padded tokens may be anything, NaN included."""
    (x, mask, y) = examples(exact, masked=True, count=1)[0]
    poisoned = Example(x, mask, torch.where(mask[..., None], y, torch.nan))
    layer = around(exact, Mean())
    clean = relative_error(layer, [Example(x, mask, y)], causal=True)
    assert relative_error(layer, [poisoned], causal=True) == clean


def test_nothing_to_match_is_refused(exact):
    with pytest.raises(ValueError, match="`examples` and `steps` must be at least 1, got 0 and 3"):
        match(exact, [], causal=True, steps=3, learning_rate=0.1)
