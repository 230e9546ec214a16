"""The quantized store: half a step, once and for all; what is in it; what that makes of the outputs."""

import pytest
import torch

from attnlens.cache.full import Full
from attnlens.cache.heavy_hitters import HeavyHitters
from attnlens.cache.quantized import Quantized
from attnlens.cache.sliding import Sliding
from attnlens.linalg.quantization import output_bound
from tests.cache.policies import begun, drawn, run

PIECES = [17, *[1] * 20, 6, *[1] * 7]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group", "residual"), [(1, 1), (4, 3), (8, 1), (5, 20)])
def test_every_entry_is_within_half_a_step_and_the_newest_are_exact(bits, group, residual):
    q, k, v = drawn(50)
    store = Quantized(bits, group, residual)
    state, _ = run(Full(store), PIECES, q, k, v)
    (keys, values), (key_slack, value_slack) = store.entries(state), store.slack(state)
    assert ((keys - k).abs() <= key_slack * (1 + 1e-9) + 1e-12).all()
    assert ((values - v).abs() <= value_slack * (1 + 1e-9) + 1e-12).all()
    assert torch.equal(keys[:, :, -residual:], k[:, :, -residual:])
    new = state.keys.shape[2]
    assert residual <= new < residual + group
    assert (50 - new) % group == 0


@pytest.mark.parametrize("bits", [2, 4])
def test_ranges_are_those_of_a_channel_of_a_group_and_of_a_token(bits):
    """One loud channel of the keys and one loud token of the values coarsen nothing but themselves."""
    q, k, v = drawn(40)
    loud_k, loud_v = k.clone(), v.clone()
    loud_k[..., 3] *= 1000
    loud_v[:, :, 5] *= 1000
    store = Quantized(bits, 8, 1)
    keys, values = store.entries(run(Full(store), [40], q, loud_k, loud_v)[0])
    calm_keys, calm_values = store.entries(run(Full(store), [40], q, k, v)[0])
    others = [c for c in range(8) if c != 3]
    assert torch.equal(keys[..., others], calm_keys[..., others])
    others = [t for t in range(40) if t != 5]
    assert torch.equal(values[:, :, others], calm_values[:, :, others])


@pytest.mark.parametrize("policy", [lambda store: HeavyHitters(6, 6, store), lambda store: Sliding(11, 3, store)])
def test_what_eviction_leaves_is_what_was_written_down_once(policy):
    """Every entry that is left stands, in order, among those of a store that dropped nothing: codes and range."""
    q, k, v = drawn(80)
    store = Quantized(2, 4, 2)
    state, full = begun(policy(store), q, k, v), begun(Full(store), q, k, v)
    for at in range(80):
        parts = [x[:, :, at : at + 1] for x in (q, k, v)]
        state, _ = policy(store).step(state, *parts)
        full, _ = Full(store).step(full, *parts)
        for left, written in zip(store.entries(state.stored), store.entries(full), strict=True):
            same = (left[:, :, :, None] == written[:, :, None]).all(-1)
            assert same.any(-1).all()
            assert (same.int().argmax(-1).diff(dim=-1) > 0).all()
        for left, written in zip(store.slack(state.stored), store.slack(full), strict=True):
            assert (left[:, :, :, None] == written[:, :, None]).all(-1).any(-1).all()
    assert state.stored.key_low.length <= state.stored.key_codes.length


def test_what_a_prompt_drops_is_never_written_down():
    """The groups of its keys are whole, whoever left."""
    state, _ = run(HeavyHitters(12, 6, Quantized(4, 4, 2)), [40], *drawn(40))
    assert state.stored.group_of is None
    assert state.stored.key_low.length == 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_outputs_obey_their_bound_and_gain_a_digit_with_every_few_bits(bits):
    q, k, v = drawn(50)
    store = Quantized(bits, 4, 3)
    policy = Full(store)
    state, _ = run(policy, [49], q, k, v)
    key_slack, value_slack = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in store.slack(state))
    _, out = policy.step(state, *(x[:, :, 49:] for x in (q, k, v)))
    exact = run(Full(), [50], q, k, v)[1][:, :, -1:]
    error = (out - exact).norm(dim=-1)
    bound = output_bound(q[:, :, -1:], v, key_slack, value_slack)
    assert (error <= bound).all()
    assert (bound < 100 * error.amax()).all()
    if bits < 8:
        finer = Quantized(2 * bits, 4, 3)
        _, better = run(Full(finer), [49, 1], q, k, v)
        assert (better[:, :, -1:] - exact).norm() < error.norm() / 3


def test_two_bits_take_a_ninth_of_the_bytes_of_float32():
    """64 wide, groups of 32: 16 + 16 of codes, 8 of a value's range and 16 of the keys' ranges, for 512 bytes."""
    k = torch.randn(1, 1, 1024 + 32, 64)
    state, _, _ = Quantized(2).extend(Quantized(2).init(1, 1, 64, 64, like=k), k, k)
    old = Full().num_bytes(state) - 32 * 512
    assert old == 1024 * (16 + 16 + 8 + 16)
    assert 9 < 1024 * 512 / old < 9.2
