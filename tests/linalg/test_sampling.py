"""The uniform sample: what each key stands for, with padding and without."""

import itertools

import torch

from attnlens.linalg.sampling import uniform_sample


def test_weights_are_unbiased_over_all_priorities():
    """Averaged over all orders of five keys, every key is worth exactly one, real keys of a padded example too."""
    like = torch.zeros(2, 1, 5, 3, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])[:, None]
    for size in (1, 2, 4, 5, 9):
        for padding in (None, mask):
            worth = torch.zeros(2, 1, 5, dtype=torch.float64)
            orders = list(itertools.permutations(range(5)))
            for order in orders:
                sample, log_weight = uniform_sample(torch.tensor(order)[None, None], size, padding, like)
                worth = worth.scatter_add(-1, sample, log_weight.exp())
            expected = torch.ones_like(mask) if padding is None else padding
            assert torch.allclose(worth / len(orders), expected.double().expand(2, 1, 5), atol=1e-12)


def test_the_sample_of_a_padded_example_is_that_of_the_short_one():
    priority = torch.randperm(12)[None, None]
    short, _ = uniform_sample(priority[..., :7], 3, None, torch.zeros(1, 1, 7, 2))
    padded, _ = uniform_sample(priority, 3, (torch.arange(12) < 7)[None, None], torch.zeros(1, 1, 12, 2))
    assert torch.equal(short, padded)
