"""Series: pairs and roles, the law of the process, what a single channel or time cannot tell, the two rules."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from attnlens.construct import construct
from attnlens.data.series import Series, baselines, nearest, pairs, process, quantize

SIZES = {
    "num_steps": 10,
    "num_channels": 6,
    "num_levels": 12,
    "coupling": 0.95,
    "num_train": 300,
    "num_validation": 40,
    "num_test": 200,
    "seed": 0,
}


def test_channels_form_pairs_of_one_leader_and_one_follower():
    partner, follows = pairs(np.random.default_rng(0), 3000, 6)
    own = np.broadcast_to(np.arange(6), partner.shape)
    assert (partner != own).all()
    assert np.array_equal(np.take_along_axis(partner, partner, axis=1), own)
    assert (follows + np.take_along_axis(follows, partner, axis=1) == 1).all()
    # Each of the 10 answers of a channel has probability 1/10.
    counts = np.bincount(partner[:, 2] + 6 * follows[:, 2], minlength=12)
    assert set(np.flatnonzero(counts == 0)) == {2, 8}
    assert np.abs(counts[counts > 0] / 3000 - 0.1).max() < 5 * np.sqrt(0.09 / 3000)


def test_a_follower_correlates_with_its_leader_one_step_before_and_with_nothing_else():
    rng = np.random.default_rng(0)
    partner, follows = pairs(rng, 4000, 4)
    x = process(rng, partner, follows, 6, coupling=0.8)
    assert abs(x.std() - 1) < 0.02
    led = np.take_along_axis(x, partner[:, None], axis=2)
    error = 5 / np.sqrt(4000 * 2 * 5)
    for lag, expected in ((0, 0.0), (1, 0.8), (2, 0.0), (-1, 0.0)):
        later, earlier = x[:, max(lag, 0) : 6 + min(lag, 0)], led[:, max(-lag, 0) : 6 - max(lag, 0)]
        which = np.broadcast_to(follows[:, None] == 1, later.shape)
        assert abs((later * earlier)[which].mean() - expected) < 2 * error
    # One channel by itself is white noise.
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 2 * error


def test_levels_have_equal_probability_and_keep_the_order():
    x = np.sort(np.random.default_rng(0).standard_normal(40000))
    levels = quantize(x, 8)
    assert (np.diff(levels) >= 0).all()
    assert np.abs(np.bincount(levels) / 40000 - 1 / 8).max() < 5 * np.sqrt(1 / 8 / 40000)


def test_labels_are_the_partner_and_the_role_of_the_channel_at_every_step():
    prepared = Series(**SIZES).prepare(Path())
    columns = prepared.splits["train"]
    assert columns["input_ids"].shape == columns["labels"].shape == (300, 60)
    labels = columns["labels"].reshape(300, 10, 6)
    assert (labels == labels[:, :1]).all()
    partner, follows = labels[:, 0] % 6, labels[:, 0] // 6
    assert np.array_equal(np.take_along_axis(partner, partner, axis=1), np.broadcast_to(np.arange(6), partner.shape))
    tokens = columns["input_ids"].reshape(300, 10, 6).astype(float)
    led = np.take_along_axis(tokens, partner[:, None], axis=2)
    gap = np.abs(tokens[:, 1:] - led[:, :-1]).mean(axis=1)
    assert gap[follows == 1].mean() < 0.4 * gap[follows == 0].mean()


def test_baselines_are_what_their_rules_score():
    """Alone, and all at one time, channels tell nothing; one step apart, nearly everything."""
    prepared = Series(**SIZES).prepare(Path())
    found = prepared.meta.baselines
    assert found == baselines(prepared.splits["test"], 6)
    assert prepared.meta.chance == pytest.approx(0.1)
    assert abs(found["nearest at the same time"] - 0.1) < 5 * np.sqrt(0.09 / 200 / 3)
    assert found["nearest one step apart"] > 0.98


def test_the_rule_names_the_nearest_channel_and_its_role():
    """Channel 1 shows what channel 0 showed one step before; 2 and 3 are constant and equal."""
    zero = np.array([3, 1, 4, 1, 5])
    tokens = np.stack([zero, np.roll(zero, 1), np.full(5, 9), np.full(5, 9)], axis=1).reshape(1, -1)
    assert nearest(tokens, 4, (1, -1))[0].tolist() == [1, 0 + 4, 3 + 4, 2 + 4]  # a tie goes to the first lag
    assert nearest(tokens, 4, (0,))[0, 2:].tolist() == [3, 2]


def test_splits_come_from_disjoint_streams_and_a_seed_repeats():
    first, again, other = (Series(**SIZES | {"seed": seed}).prepare(Path()) for seed in (0, 0, 1))
    rows = {name: {row.tobytes() for row in columns["input_ids"]} for name, columns in first.splits.items()}
    assert {name: len(found) for name, found in rows.items()} == {"train": 300, "validation": 40, "test": 200}
    assert not rows["train"] & rows["test"]
    for split in rows:
        assert np.array_equal(first.splits[split]["input_ids"], again.splits[split]["input_ids"])
        assert not np.array_equal(first.splits[split]["input_ids"], other.splits[split]["input_ids"])


def test_the_config_fits_a_grid_of_eight_columns():
    config = construct(OmegaConf.load("conf/data/series.yaml"))
    assert config.num_channels == OmegaConf.load("conf/attention/axial.yaml").num_columns
    assert config.num_channels == OmegaConf.load("conf/position/grid.yaml").num_columns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 1}, "`num_steps` is 1: choose 2 or more"),
        ({"num_channels": 5}, "`num_channels` is 5: choose an even number"),
        ({"num_levels": 1}, "`num_levels` is 1"),
        ({"coupling": 0.0}, "`coupling` is 0.0"),
        ({"num_test": 0}, "`num_test` is 0"),
    ],
)
def test_sizes_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Series(**SIZES | change)
