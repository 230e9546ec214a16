"""What every policy of conf/cache owes, with every store."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils import _pytree as pytree

from attnlens.cache.full import Full
from attnlens.cache.heavy_hitters import HeavyHitters
from attnlens.cache.plain import Plain
from attnlens.cache.quantized import Quantized
from attnlens.cache.sliding import Sliding
from attnlens.cache.snapkv import SnapKV
from attnlens.construct import construct
from tests.cache.policies import begun, drawn, run

FILES = sorted((Path(__file__).parents[2] / "conf/cache").glob("*.yaml"))
STORES = {"plain": Plain, "quantized": lambda: Quantized(4, group=3, residual=2)}
POLICIES = {
    "full": Full,
    "sliding": lambda store: Sliding(6, 2, store),
    "heavy_hitters": lambda store: HeavyHitters(3, 5, store),
    "snapkv": lambda store: SnapKV(7, 3, 3, store),
}
PIECES = [[12, *[1] * 8, 4, 3, *[1] * 5], [1] * 32, [9, 2, 11, 10]]


@pytest.fixture(params=[(p, s) for p in POLICIES for s in STORES], ids=lambda pair: "-".join(pair))
def policy(request):
    name, store = request.param
    return POLICIES[name](STORES[store]())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configurations_build_and_equal_full_where_nothing_is_dropped(path):
    """Quantized, the newest tokens are exact: up to `residual` of them nothing is lost."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    policy, parts = construct(config), drawn(24)
    torch.testing.assert_close(run(policy, [10, *[1] * 14], *parts)[1], run(Full(), [24], *parts)[1])


@pytest.mark.parametrize("make", [lambda: Sliding(30, 2), lambda: HeavyHitters(1, 31), lambda: SnapKV(32, 2)])
@pytest.mark.parametrize("pieces", PIECES)
def test_a_budget_of_the_length_equals_full_exactly(make, pieces):
    parts = drawn(32)
    state, out = run(make(), pieces, *parts)
    full, expected = run(Full(), pieces, *parts)
    assert torch.equal(out, expected)
    assert torch.equal(state.stored.keys.tensor, full.keys.tensor)


@pytest.mark.parametrize("pieces", PIECES)
def test_rows_of_a_batch_do_not_mix(policy, pieces):
    parts = drawn(32, batch=3)
    loud = [x * torch.tensor([1.0, 30.0, 0.1]).double()[:, None, None, None] for x in parts]
    together = run(policy, pieces, *loud)[1]
    for row in range(3):
        alone = run(policy, pieces, *(x[row : row + 1] for x in loud))[1]
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("pieces", PIECES)
def test_groups_of_heads_do_not_mix(policy, pieces):
    q, k, v = drawn(32)
    together = run(policy, pieces, q, k, v)[1]
    for group in range(2):
        alone = run(policy, pieces, q[:, 2 * group : 2 * group + 2], k[:, group : group + 1], v[:, group : group + 1])
        torch.testing.assert_close(together[:, 2 * group : 2 * group + 2], alone[1])


def test_two_continuations_of_one_prefix_do_not_meet(policy):
    first, second = drawn(32), drawn(32, seed=1)
    second = tuple(torch.cat([a[:, :, :17], b[:, :, 17:]], 2) for a, b in zip(first, second, strict=True))
    prefix, _ = run(policy, [14, 1, 1, 1], *first)
    rest = [[x[:, :, 17:] for x in parts] for parts in (first, second)]
    states = [prefix, prefix]
    outs = [[], []]
    for at in range(15):
        for i in (0, 1):
            states[i], out = policy.step(states[i], *(x[:, :, at : at + 1] for x in rest[i]))
            outs[i].append(out)
    for parts, out in zip((first, second), outs, strict=True):
        torch.testing.assert_close(torch.cat(out, 2), run(policy, [14, *[1] * 18], *parts)[1][:, :, 17:])


def test_beams_may_be_reordered_at_any_time(policy):
    parts, order = drawn(32, batch=3), torch.tensor([2, 0, 0])
    state, _ = run(policy, [14, 1, 1, 1], *parts)
    state = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.index_select(0, order), state)
    _, out = run(policy, [1] * 15, *(x[order, :, 17:] for x in parts), state=state)
    expected = run(policy, [14, *[1] * 18], *(x[order] for x in parts))[1]
    torch.testing.assert_close(out, expected[:, :, 17:])


def test_a_call_sees_its_own_tokens_exactly(policy):
    """Also those that the policy then drops or the store then rounds; a window sees what it says."""
    q, k, v = drawn(20)
    out = run(policy, [20], q, k, v)[1]
    seen = run(Full(), [20], q, k, v)[1]
    rows = slice(0, 8) if isinstance(policy, Sliding) else slice(None)
    torch.testing.assert_close(out[:, :, rows], seen[:, :, rows])


def test_later_tokens_do_not_reach_earlier_ones(policy):
    first, other = drawn(32), drawn(32, seed=1)
    changed = [torch.cat([a[:, :, :18], b[:, :, 18:]], 2) for a, b in zip(first, other, strict=True)]
    outs = [run(policy, [9, 5, *[1] * 4, 14], *parts)[1][:, :, :18] for parts in (first, changed)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_keep_the_dtype_and_its_accuracy(policy, dtype):
    parts = drawn(32, dtype=dtype)
    out = run(policy, PIECES[0], *parts)[1]
    assert out.dtype == dtype
    wide = run(policy, PIECES[0], *(x.double() for x in parts))[1]
    # Near ties of half-precision votes may fall otherwise: the median does not see them.
    assert ((out.double() - wide).abs().median() < 8 * torch.finfo(dtype).eps * wide.abs().max()).item()


@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_bytes_are_those_of_the_formulas(policy, steps):
    """Two batch rows and two groups in float64: keys of 8, values of 6; codes of 4 and 3 bytes."""
    state, _ = run(policy, [12, *[1] * steps], *drawn(32))
    entries = {Full: 12 + steps, Sliding: 8, HeavyHitters: 8, SnapKV: 7 + steps}[type(policy)]
    stored = state if isinstance(policy, Full) else state.stored
    assert policy.store.length(stored) == entries
    assert policy.store.entries(stored)[0].shape == (2, 2, entries, 8)
    row = entries * 8 * (8 + 6)
    if isinstance(policy.store, Quantized):
        new = stored.keys.shape[2]
        assert 2 <= new <= 4
        old, groups, numbered = entries - new, stored.key_low.length, stored.group_of is not None
        assert numbered or groups == old // 3
        row = new * 8 * (8 + 6) + old * (4 + 3 + 2 * 8 + 4 * numbered) + groups * 2 * 8 * 8
    assert policy.num_bytes(state) == 4 * (row + (entries * 8 if isinstance(policy, HeavyHitters) else 0))


def test_a_store_that_cannot_drop_what_a_policy_wants_to_is_refused():
    store = Quantized(2, group=8, residual=8)
    with pytest.raises(ValueError, match="newest 15 entries, which it holds in full precision, but `window`"):
        Sliding(14, 4, store)
    with pytest.raises(ValueError, match="`recent` protects 14: raise `recent`, or lower `residual` or `group`"):
        HeavyHitters(4, 14, store)
    assert SnapKV(8, 4, store=store).store is store


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sliding(0), "`window` must be at least 1"),
        (lambda: Sliding(3, -1), "`num_sinks` must be at least 0, got -1"),
        (lambda: HeavyHitters(0, 4), "`heavy` must be at least 1, got 0; a window alone is the policy `sliding`"),
        (lambda: HeavyHitters(4, 0), "`recent` must be at least 1"),
        (lambda: SnapKV(8, 0), "`window` must be at least 1"),
        (lambda: SnapKV(8, 9), "`budget` holds the `window`, got 8 and 9: raise it, or lower `window`"),
        (lambda: SnapKV(8, 4, 2), "`kernel` must be odd and at least 1, got 2"),
        (lambda: Quantized(3), "`bits` must be 2, 4 or 8, got 3; 16 bits and more are the store `Plain`"),
        (lambda: Quantized(4, 0), "`group` must be at least 1, got 0"),
        (lambda: Quantized(4, 8, 0), "`residual` must be at least 1"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bytes_of_an_empty_state_are_none(policy):
    assert policy.num_bytes(begun(policy, *drawn(1))) == 0
