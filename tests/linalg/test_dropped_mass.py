"""The dropped-mass bound: against a loop over rows, against the window's own bound, attained by opposite values."""

import torch

from attnlens.attention.window import Window
from attnlens.linalg.dense import softmax_weights
from attnlens.linalg.dropped_mass import dropped_mass_bound
from attnlens.testing.inputs import gaussian


def random_pattern(n, seed=0):
    return torch.rand(2, 2, n, n, generator=torch.Generator().manual_seed(seed)) < 0.4


def restricted(q, k, v, visited):
    """Softmax over the visited keys, renormalized; a row without any is zero."""
    weights = softmax_weights(q, k).masked_fill(~visited, 0)
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-300) @ v


def test_every_row_lies_within_and_the_bound_is_the_mass_times_the_diameter():
    for scale in (0.1, 1.0, 3.0):
        q, k, v = gaussian(17, logit_scale=scale)
        visited = random_pattern(17)
        visited[0, 0, 3] = False
        bound = dropped_mass_bound(visited, q, k, v, causal=False, key_padding_mask=None)
        error = (restricted(q, k, v, visited) - softmax_weights(q, k) @ v).norm(dim=-1)
        assert (error <= bound).all()
        weights = softmax_weights(q, k)[1, 1, 5]
        delta = sum(weights[j].item() for j in range(17) if not visited[1, 1, 5, j])
        diameter = max((x - y).norm().item() for x in v[1, 1] for y in v[1, 1])
        assert abs(bound[1, 1, 5].item() - delta * diameter) < 1e-9


def test_opposite_values_attain_it():
    q, k, _ = gaussian(17)
    visited = random_pattern(17)
    visited[..., 0] = True
    v = torch.where(visited[:, :, 5, :, None], 1.0, -1.0).double().expand(-1, -1, -1, 3)
    error = (restricted(q, k, v, visited) - softmax_weights(q, k) @ v).norm(dim=-1)[:, :, 5]
    bound = dropped_mass_bound(visited, q, k, v, causal=False, key_padding_mask=None)[:, :, 5]
    assert torch.allclose(error, bound, rtol=1e-9)


def test_padding_is_never_read_and_a_band_gives_the_bound_of_the_window():
    q, k, v = gaussian(20)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    q, k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v))
    position = torch.arange(20)
    near = ((position[:, None] - position).abs() < 4).expand(2, 2, 20, 20)
    for causal in (False, True):
        seen = near.tril() if causal else near
        found = dropped_mass_bound(seen, q, k, v, causal=causal, key_padding_mask=mask)
        expected = Window(4).error_bound(q, k, v, causal=causal, key_padding_mask=mask)
        real = mask[:, None].expand_as(found)
        assert torch.allclose(found[real], expected[real], rtol=1e-9)


def test_a_row_whose_visited_weights_underflow_may_still_err_by_the_diameter():
    """Logits 2000 apart: the visited key weighs nothing in the exact row, and its value may be opposite to the other.
    Such rows counted as empty, with a bound of max |v|, half of the error."""
    q = torch.full((1, 1, 2, 1), 1000.0, dtype=torch.float64)
    k = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 1)
    visited = torch.tensor([False, True]).expand(1, 1, 2, 2)
    bound = dropped_mass_bound(visited, q, k, k, causal=False, key_padding_mask=None)
    error = (k[:, :, 1:] - softmax_weights(q, k) @ k).norm(dim=-1)
    assert (error == 2).all()
    assert (error <= bound).all()


def test_the_diameter_of_values_that_are_long_and_close():
    """As a difference of squared norms it was off by half in the last case."""
    q, k, v = gaussian(43)
    for t in (1e-3, 1e-5, 1e-6):
        visited = random_pattern(43)
        visited[..., 0] = True
        moved = 1000 + t * v
        bound = dropped_mass_bound(visited, q, k, moved, causal=False, key_padding_mask=None)
        error = (restricted(q, k, moved, visited) - softmax_weights(q, k) @ moved).norm(dim=-1)
        diameter = (moved[:, :, :, None] - moved[:, :, None]).norm(dim=-1).amax((-2, -1))[..., None]
        dropped = softmax_weights(q, k).masked_fill(visited, 0).sum(-1)
        assert (error <= bound).all()
        assert torch.allclose(bound, dropped * diameter, rtol=1e-3, atol=1e-9)
