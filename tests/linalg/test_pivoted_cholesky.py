"""Randomly pivoted Cholesky: the law of its pivots, what it leaves out, and what it leaves behind."""

import torch

from attnlens.linalg.pivoted_cholesky import random_pivots


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def everything(m):
    return torch.ones(1, m, dtype=torch.bool)


def residual(x, pivots):
    """H - H_:S H_SS^{-1} H_S: of one head by its definition."""
    h = (x @ x.mT).exp()
    return h - h[:, pivots] @ torch.linalg.solve(h[pivots][:, pivots], h[pivots])


def test_pivots_follow_the_residual_diagonal_of_the_exponential_kernel():
    """Two steps over five points, 20,000 draws (heads): frequencies of all ordered pairs against their probabilities.
    Drawing from the Gaussian kernel's own residual, without e^{|x|^2}, would make the first pivot uniform."""
    x, draws = 0.7 * draw(5, 3), 20_000
    pivots, filled = random_pivots(x.expand(1, draws, 5, 3), uniform(draws, 2), everything(5))
    assert filled.all()
    counts = torch.bincount(pivots[0, :, 0] * 5 + pivots[0, :, 1], minlength=25).double().view(5, 5) / draws
    first = (x @ x.mT).exp().diagonal()
    first = first / first.sum()
    assert first.max() > 1.5 / 5
    for i in range(5):
        second = residual(x, torch.tensor([i])).diagonal().clamp_min(0)
        expected = first[i] * second / second.sum()
        assert counts[i, i] == 0
        assert ((counts[i] - expected).abs() < 5 * (expected / draws).sqrt() + 1e-12).all()


def test_pivots_beat_uniform_ones_in_the_trace_they_leave():
    """Two tight clusters of different size and far outliers: uniform points miss the outliers."""
    x = torch.cat([0.01 * draw(60, 3), 1 + 0.01 * draw(30, 3, seed=1), 1.5 * draw(4, 3, seed=2)])
    pivots, _ = random_pivots(x.expand(1, 50, -1, 3), uniform(50, 6), everything(94))
    ours = torch.stack([residual(x, p).diagonal().sum() for p in pivots[0]]).mean()
    generator = torch.Generator().manual_seed(0)
    others = [residual(x, torch.randperm(94, generator=generator)[:6]).diagonal().sum() for _ in range(50)]
    assert ours < 0.1 * torch.stack(others).mean()


def test_points_that_others_reproduce_are_never_drawn():
    x = draw(4, 3).repeat(5, 1)[None, None]
    pivots, filled = random_pivots(x, uniform(1, 8), everything(20))
    assert filled[0, 0].tolist() == [True] * 4 + [False] * 4
    assert sorted((pivots[0, 0, :4] % 4).tolist()) == [0, 1, 2, 3]


def test_padding_is_never_drawn_and_does_not_change_the_draw():
    x = draw(2, 3, 12, 4)
    real = torch.arange(12) < torch.tensor([12, 5])[:, None]
    x = x * real[:, None, :, None]
    pivots, filled = random_pivots(x, uniform(3, 7), real)
    assert filled[0].all()
    assert filled[1].sum(-1).tolist() == [5, 5, 5]
    assert pivots[1][filled[1]].max() < 5
    short, _ = random_pivots(x[1:, :, :5], uniform(3, 7), everything(5))
    assert torch.equal(short[filled[1:]], pivots[1:][filled[1:]])


def test_large_norms_neither_overflow_nor_repeat_a_pivot():
    x = 20 * draw(1, 2, 40, 8).float()
    pivots, filled = random_pivots(x, uniform(2, 10), everything(40))
    assert filled.all()
    assert all(len(set(head.tolist())) == 10 for head in pivots[0])
