"""Losses, scores and the learning rate, against formulas written out."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.training.learner import rate
from attnlens.training.objective import accuracy, bits, cross_entropy, scorer

LABELS = torch.tensor([[0, -100, 2], [1, 1, -100]])


def logits():
    return torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_cross_entropy_is_the_mean_over_labels_that_count():
    z = logits()
    logp = z.log_softmax(-1)
    expected = -(logp[0, 0, 0] + logp[0, 2, 2] + logp[1, 0, 1] + logp[1, 1, 1]) / 4
    torch.testing.assert_close(cross_entropy(z, LABELS), expected)
    torch.testing.assert_close(cross_entropy(z[:, 0], LABELS[:, 0]), -(logp[0, 0, 0] + logp[1, 0, 1]) / 2)


def test_accuracy_is_per_example():
    z = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1], [1, 1, 3]]), 4).double()
    assert accuracy(z, LABELS).tolist() == [0.5, 1.0]
    assert accuracy(z[:, 0], torch.tensor([0, 2])).tolist() == [1.0, 0.0]


def test_bits_per_character_of_a_uniform_guess():
    """Four symbols cost 2 bits each; tokens of 1.6 characters spread them."""
    z = torch.zeros(2, 3, 4)
    score = scorer({"metric": "bits_per_character", "characters_per_token": 1.6})
    torch.testing.assert_close(score(z, LABELS), torch.full((2,), 2 / 1.6, dtype=torch.float64))
    per_example = bits(logits(), LABELS, characters_per_token=1.0)
    assert (per_example * 2 * math.log(2)).sum().item() / 4 == pytest.approx(cross_entropy(logits(), LABELS).item())


def test_the_learning_rate_rises_and_falls_linearly():
    training = OmegaConf.create({"steps": 110, "warmup_steps": 10, "final_fraction": 0.05})
    assert [rate(step, training) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rate(60, training) == pytest.approx(0.525)
    assert rate(110, training) == pytest.approx(0.05)
    assert rate(0, OmegaConf.merge(training, {"warmup_steps": 0})) == 1.0


def test_spelling_is_added_to_the_bits_of_its_split():
    z = logits()
    meta = {"metric": "bits_per_character", "characters_per_token": 4.0, "spelling": {"validation": 0.5, "test": 0.25}}
    plain = bits(z, LABELS, characters_per_token=4.0)
    torch.testing.assert_close(scorer(meta)(z, LABELS), plain + 0.25)
    torch.testing.assert_close(scorer(meta, "validation")(z, LABELS), plain + 0.5)
