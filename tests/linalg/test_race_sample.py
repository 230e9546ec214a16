"""The race: what sampled keys stand for, over many races; which of two derivatives is the unbiased one."""

import torch

from attnlens.linalg.sampling import race_sample, value_probability

RACES = 20000


def races(probability, size, mask=None, seed=0):
    """Indicator times weight of every key, in `RACES` heads that run their own race."""
    c = probability.shape[-1]
    waiting = torch.empty(1, RACES, c, dtype=torch.float64)
    waiting = waiting.exponential_(generator=torch.Generator().manual_seed(seed))
    spread = probability.expand(1, RACES, c)
    sample, log_weight = race_sample(waiting, size, mask, spread)
    return torch.zeros(1, RACES, c, dtype=torch.float64).scatter_add(-1, sample, log_weight.exp())[0]


def test_every_key_is_worth_one_and_two_keys_are_uncorrelated():
    probability = torch.tensor([0.02, 0.08, 0.1, 0.1, 0.3, 0.4], dtype=torch.float64)
    for size in (2, 3, 4, 5):
        worth = races(probability, size)
        assert ((worth > 0).sum(-1) == size).all()
        error = (worth.mean(0) - 1).abs()
        assert (error <= 5 * worth.std(0) / RACES**0.5 + 1e-12).all()
        if size < 4:
            continue  # the squares of products have no mean
        centered = worth - 1
        products = centered[:, :, None] * centered[:, None]
        off = ~torch.eye(6, dtype=torch.bool)
        assert (products.mean(0).abs() <= 5 * products.std(0) / RACES**0.5 + 1e-12)[off].all()


def test_the_weight_is_close_to_one_over_m_p_for_small_probabilities():
    """1 / (m p_j), the weight of a draw with replacement, up to the fluctuation of the last arrival, about m^{-1/2}."""
    c, size = 400, 100
    probability = torch.full((c,), 1 / c, dtype=torch.float64)
    waiting = torch.empty(1, 50, c, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1))
    _, log_weight = race_sample(waiting, size, None, probability.expand(1, 50, c))
    # Without replacement a key stands for c / m exactly; 1 / (1 - e^{-p t}) has that mean.
    assert abs(log_weight.exp().mean() - c / size) < 0.1


def test_all_keys_fit():
    probability = torch.full((1, 1, 4), 0.25, dtype=torch.float64)
    for size in (4, 9):
        sample, log_weight = race_sample(torch.rand(1, 1, 4), size, None, probability)
        assert sorted(sample.flatten().tolist()) == [0, 1, 2, 3]
        assert (log_weight == 0).all()


def test_the_race_of_a_padded_example_is_that_of_the_short_one():
    v = torch.randn(1, 1, 12, 3, dtype=torch.float64)
    waiting = torch.rand(1, 1, 12).exponential_(generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < 7)[None, None]
    padded_v = torch.where(mask[..., None], v, 0)
    for size in (3, 6, 7, 9):
        short = race_sample(waiting[..., :7], size, None, value_probability(v[:, :, :7], None))
        padded = race_sample(waiting, size, mask, value_probability(padded_v, mask))
        kept = short[0].shape[-1]
        assert torch.equal(short[0], padded[0][..., :kept])
        assert torch.allclose(short[1], padded[1][..., :kept])
        assert (padded[1][..., kept:] == -torch.inf).all()


def test_probabilities_are_half_by_length_and_half_uniform():
    v = torch.tensor([[[[3.0, 4.0], [0.0, 0.0], [0.0, 15.0]]]], dtype=torch.float64)
    expected = torch.tensor([5 / 20, 0, 15 / 20], dtype=torch.float64) / 2 + 1 / 6
    assert torch.allclose(value_probability(v, None)[0, 0], expected)
    assert torch.allclose(value_probability(7 * v, None)[0, 0], expected)
    assert torch.allclose(value_probability(0 * v, None)[0, 0], torch.full((3,), 1 / 3, dtype=torch.float64))
    none = torch.zeros(1, 1, 3, dtype=torch.bool)
    assert (value_probability(0 * v, none) == 0).all()


def test_constant_weights_give_the_unbiased_gradient():
    """Let sum_j f_j(t), f_j = p_j(t), be estimated with p(t). The mean derivative at constant weights is that of the
    sum; differentiating the weights too would add the mean of sum_{j in S} f_j dw_j/dt, which is not zero."""
    base = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    slope = torch.tensor([1.0, -0.5, 0.3, -0.8], dtype=torch.float64)
    step = 1e-4
    worth = races(base, 3)
    derivative = (worth * slope).sum(-1)
    assert abs(derivative.mean() - slope.sum()) <= 5 * derivative.std() / RACES**0.5
    moved = races(base + step * slope, 3)
    same = ((worth > 0) == (moved > 0)).all(-1)
    other = ((moved - worth) / step * base).sum(-1)[same]
    assert abs(other.mean()) > 10 * other.std() / same.sum() ** 0.5
