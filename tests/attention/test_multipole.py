"""Multipole attention: a loop over queries as oracle, the theorems behind the bound, and what every option promises."""

import math
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import measure_flops
from attnlens.attention import build
from attnlens.attention.multipole import Multipole
from attnlens.attention.softmax import softmax_naive, softmax_weights
from attnlens.linalg.cluster_bound import diameters
from attnlens.linalg.clusters import clusters_of_clusters, clusters_of_keys
from attnlens.linalg.kmeans import k_means
from attnlens.linalg.online_kmeans import online_k_means
from attnlens.linalg.selected import value_diameter
from attnlens.position.rope import Rope
from attnlens.testing import CONTRACT
from attnlens.testing.inputs import EXACT, gaussian
from attnlens.testing.theory import log_log_slope

VARIANTS = {
    "plain": {"num_keys": 7, "num_clusters": 4, "window": 16},
    "one window": {"num_keys": 7, "num_clusters": 5, "window": 100, "block_size": 20, "by_mass": False},
    "online": {"num_keys": 7, "num_clusters": 8, "window": 16, "block_size": 4},
    "two levels": {"num_keys": 7, "num_clusters": 8, "window": 16, "num_coarse": 3, "num_fine": 6},
    "both": {"num_keys": 7, "num_clusters": 8, "window": 8, "block_size": 4, "num_coarse": 3, "num_fine": 9},
    "first order": {"num_keys": 7, "num_clusters": 4, "window": 16, "first_order": True},
    "rotary": {"num_keys": 7, "num_clusters": 4, "window": 16, "rope_base": 100.0, "rope_distance": 6},
}


def operator(**overrides):
    config = OmegaConf.load("conf/attention/multipole.yaml")
    return build(config, head_dim=8, num_heads=2, max_length=128, seed=0, **overrides).double()


def greedy(scores, sizes, budget):
    """Clusters in order until one does not fit, then the others that fit, in order until one does not."""
    order = sorted(range(len(scores)), key=lambda c: -scores[c])
    opened, left = [], budget
    for _ in range(2):
        possible = [c for c in order if c not in opened and 0 < sizes[c] <= left]
        for c in possible:
            if sizes[c] > left:
                break
            opened.append(c)
            left -= sizes[c]
    return opened


def windows_seen(op, k, t):
    """(first key, clusters of keys) of every window that block t sees, None: all, by k-means of that window alone."""
    m, found = k.shape[2], []
    end = m if t is None else t * op.block_size
    for begin in range(0, end, op.window):
        keys = k[:, :, begin : min(begin + op.window, end)]
        if t is None:
            found.append((begin, k_means(keys, op.direction, op.num_clusters, op.iterations, None)[0], 1.0))
        else:
            added = op.num_clusters * op.block_size // op.window
            label = online_k_means(keys, op.direction, op.block_size, added, op.iterations, None)[-1]
            found.append((begin, label, keys.shape[2] / op.window))
    return found


def groups_seen(op, k, t, b, h):
    """Lists of lists of keys: coarse clusters of clusters; with one level every cluster is on its own."""
    groups = []
    for begin, label, share in windows_seen(op, k, t):
        count = round(op.num_clusters * share)
        of_keys = [[begin + j for j in range(label.shape[2]) if label[b, h, j] == c] for c in range(count)]
        if op.num_coarse is None:
            groups += [[keys] for keys in of_keys if keys]
            continue
        keys = k[:, :, begin : begin + label.shape[2]]
        fine = clusters_of_keys(keys, keys, label, count)
        coarse = clusters_of_clusters(fine, op.direction, math.ceil(op.num_coarse * share), op.iterations)
        start, members = coarse.start[b, h].tolist(), coarse.members[b, h].tolist()
        order = coarse.order[b, h].tolist()
        groups += [[of_keys[f] for f in order[s : s + m]] for s, m in zip(start, members, strict=True) if m]
    return groups


def loop_attention(q, k, v, op, causal):
    """The definition of the output, one head and one query at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    n, s = q.shape[2], q.shape[-1] ** -0.5
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = {}
            for i in range(n):
                t = i // op.block_size if causal else None
                exact = list(range(t * op.block_size, i + 1)) if causal else []
                groups = seen[t] if t in seen else seen.setdefault(t, groups_seen(op, k.detach(), t, b, h))
                terms = far_terms(q[b, h, i], k[b, h], v[b, h], groups, exact, op, s)
                weight = [torch.exp(s * q[b, h, i] @ k[b, h, j]) for j in exact] + [m for m, _ in terms]
                value = [v[b, h, j] for j in exact] + [x for _, x in terms]
                out[b, h, i] = sum(w * x for w, x in zip(weight, value, strict=True)) / sum(weight)
    return out


def far_terms(q, k, v, groups, exact, op, s):
    """(mass, value) of every closed cluster; the keys of those that are opened are added to `exact`."""

    def score(keys):
        return float(s * q.detach() @ k[keys].detach().mean(0)) + (math.log(len(keys)) if op.by_mass else 0)

    def term(keys):
        c, mean = k[keys].mean(0), v[keys].mean(0)
        if op.first_order:
            slope = sum(torch.outer(k[j] - c, v[j] - mean) for j in keys) / len(keys)
            mean = mean + slope.T @ (s * q)
        return len(keys) * torch.exp(s * q @ c), mean

    terms, clusters = [], [keys for group in groups for keys in group]
    if op.num_coarse is not None:
        flat = [[j for keys in group for j in keys] for group in groups]
        opened = greedy([score(keys) for keys in flat], [len(group) for group in groups], op.num_fine)
        terms = [term(keys) for g, keys in enumerate(flat) if g not in opened]
        clusters = [keys for g in opened for keys in groups[g]]
    opened = greedy([score(keys) for keys in clusters], [len(keys) for keys in clusters], op.num_keys)
    exact += [j for c in opened for j in clusters[c]]
    return terms + [term(keys) for c, keys in enumerate(clusters) if c not in opened]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["plain", "online", "two levels", "both", "first order"])
def test_equals_the_loop_forward_and_backward(name, causal):
    """Clusters of the loop are those of each window alone and, causal, of the prefix alone."""
    op = operator(**VARIANTS[name])
    inputs = [x[:1, :, :21].requires_grad_() for x in gaussian(21, value_dim=5, logit_scale=2.0)]
    direction = torch.randn(1, 2, 21, 5, dtype=torch.float64)
    found, expected = op(*inputs, causal=causal), loop_attention(*inputs, op, causal)
    assert torch.allclose(found, expected, atol=EXACT)
    pairs = zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    )
    assert all(torch.allclose(x, y, atol=EXACT) for x, y in pairs)


ROWS_OF_THE_CONTRACT = (
    "causal",
    "padding_is_never_read",
    "nan_query_stays_in_its_row",
    "constant_values",
    "device_independence",
)


@pytest.mark.parametrize("row", ROWS_OF_THE_CONTRACT)
@pytest.mark.parametrize("name", ["both", "rotary"])
def test_every_option_keeps_the_contract(name, row):
    longer = {"window": 48, "block_size": 24} if name == "both" else {}

    def factory(head_dim, num_heads, max_length, seed, **overrides):
        arguments = {**VARIANTS[name], **longer, **overrides}
        return Multipole(**arguments, head_dim=head_dim, num_heads=num_heads, seed=seed)

    CONTRACT[row](factory)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_every_option_keeps_its_bound(name, causal):
    """Coarse clusters, moments and windowed positions included; the bound stays within a factor of ten of the error."""
    q, k, v = gaussian(40, logit_scale=2.0)
    op = operator(**VARIANTS[name])
    error = (op(q, k, v, causal=causal) - softmax_naive(q, k, v, causal=causal)).norm(dim=-1)
    bound = op.error_bound(q, k, v, causal=causal)
    assert (error <= bound + EXACT).all()
    assert error.max() > 0.01
    assert bound.median() < 10 * error.median() + EXACT


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 9.0])
def test_mass_is_underestimated_to_second_order(scale):
    """N e^{s<q, c>} <= sum of e^{s<q, k>} <= that times e^{s^2 |q|^2 rad^2 / 2}: Jensen, and Hoeffding's lemma."""
    q, k, v = gaussian(50, logit_scale=scale)
    cluster, centers = k_means(k, operator().direction, 7, 5, None)
    found = clusters_of_keys(k, v, cluster, 7)
    assert torch.allclose(found.centers, centers)
    member = torch.nn.functional.one_hot(cluster, 7).bool().mT[:, :, None]
    s = 8**-0.5
    true = (s * q @ k.mT)[:, :, :, None].masked_fill(~member, -torch.inf).logsumexp(-1)
    mass = s * q @ centers.mT + found.size.log()[:, :, None]
    gap = (true - mass)[(found.size > 0)[:, :, None].expand_as(mass)]
    radius = torch.cdist(centers, k).masked_fill(~member[:, :, 0], 0).amax(-1)
    most = (s * q.norm(dim=-1)[..., None] * radius[:, :, None]).square() / 2
    assert gap.min() >= -EXACT
    assert gap.max() > 1e-4
    assert (gap <= most[(found.size > 0)[:, :, None].expand_as(mass)] + EXACT).all()


def test_the_bound_holds_for_values_that_are_long_and_close():
    """Distances of values as differences of squared norms: a bound of 5.8e-7 on an error of 7.0e-7."""
    op = operator(**VARIANTS["online"])
    q, k, v = gaussian(43, value_dim=13)
    for t in (1e-3, 1e-5, 1e-6):
        moved = 1000 + t * v
        error = (op(q, k, moved, causal=True) - softmax_naive(q, k, moved, causal=True)).norm(dim=-1)
        assert error.max() > t / 10
        assert (error <= op.error_bound(q, k, moved, causal=True) * (1 + EXACT)).all()


def in_radii(op, q, k, v):
    """delta (max s |q| rad diam(V_c) / 2 + (1 - min e^{-s^2 |q|^2 rad^2 / 2}) diam(V)) over closed ones, one window."""
    field, (fine, _) = next(op.fields(q, k, v, False, None))
    cluster, _ = k_means(k, op.direction, op.num_clusters, op.iterations, None)
    closed = ~field.keys.clusters & (fine.size > 0)[:, :, None]
    member = torch.nn.functional.one_hot(cluster, op.num_clusters).bool().mT
    radius = torch.cdist(fine.centers, k).masked_fill(~member, 0).amax(-1)
    reach = q.shape[-1] ** -0.5 * q.norm(dim=-1)[..., None] * radius[:, :, None]
    weights = softmax_weights(q, k)
    delta = (weights @ member.double().mT).masked_fill(~closed, 0).sum(-1)
    of_values = (reach / 2 * diameters(v, cluster, op.num_clusters)[:, :, None]).masked_fill(~closed, 0).amax(-1)
    of_mass = 1 - torch.exp(-reach.square() / 2).masked_fill(~closed, 1).amin(-1)
    return delta * (of_values + of_mass * value_diameter(v, causal=False, key_padding_mask=None))


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("num_keys", [1, 10, 25])
def test_error_within_the_declared_bound_within_the_one_in_radii(scale, num_keys):
    q, k, v = gaussian(40, logit_scale=scale)
    op = operator(num_keys=num_keys, num_clusters=9, window=40)
    error = (op(q, k, v) - softmax_naive(q, k, v)).norm(dim=-1)
    declared, by_radii = op.error_bound(q, k, v), in_radii(op, q, k, v)
    assert error.max() > 1e-4
    assert (error <= declared + EXACT).all()
    assert (declared <= by_radii + EXACT).all()


@pytest.mark.parametrize(("first_order", "order"), [(False, 1), (True, 2)])
def test_order_of_the_error_in_the_radius(first_order, order):
    """Keys at four points plus t times noise: with the moment of each cluster the first-order error is gone."""
    q, k, v = gaussian(40)
    points = 4 * k[:, :, :4].repeat(1, 1, 10, 1)
    op = operator(num_keys=1, num_clusters=4, window=40, first_order=first_order)
    sizes = (1, 2, 4, 8)
    errors = [(op(q, y, v) - softmax_naive(q, y, v)).norm().item() for y in (points + t / 100 * k for t in sizes)]
    assert abs(log_log_slope(sizes, errors) - order) < 0.1


def test_first_order_is_the_kernel_1_plus_x():
    """Weights N e^{s<q, c>} / N of a cluster become e^{s<q, c>} (1 + x), x = s <q, k - c>, and may be negative."""
    q, k, _ = gaussian(12, logit_scale=3.0)
    op = operator(num_keys=1, num_clusters=2, window=12, first_order=True)
    cluster, centers = k_means(k, op.direction, 2, op.iterations, None)
    base = 8**-0.5 * q @ centers.gather(2, cluster[..., None].expand_as(k)).mT
    weights = base.exp() * (1 + 8**-0.5 * q @ k.mT - base)
    assert torch.allclose(op.matrix(q, k), weights / weights.sum(-1, keepdim=True), atol=EXACT)
    assert op.matrix(q, k).min() < 0
    assert not op.row_stochastic
    assert operator().row_stochastic


@pytest.mark.parametrize("causal", [False, True])
def test_every_key_a_cluster_is_softmax_with_no_cluster_opened(causal):
    q, k, v = gaussian(33)
    op = operator(num_keys=1, num_clusters=16, window=16)
    assert torch.allclose(op(q, k, v, causal=causal), softmax_naive(q, k, v, causal=causal), atol=EXACT)


@pytest.mark.parametrize("name", VARIANTS)
def test_causal_is_exact_once_the_finished_past_is_opened(name):
    """Through clusters, slots and merging, below the length at which the operator takes softmax attention directly."""
    op = operator(**{**VARIANTS[name], "num_keys": 32} | ({"num_fine": 40} if "num_fine" in VARIANTS[name] else {}))
    q, k, v = gaussian(33)
    assert torch.allclose(op(q, k, v, causal=True), softmax_naive(q, k, v, causal=True), atol=EXACT)


def test_padding_anywhere_equals_the_run_without_it():
    op = operator(num_keys=6, num_clusters=5, window=100)
    q, k, v = gaussian(21)
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < 0.6
    poisoned = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v)]
    found = op(q, *poisoned, key_padding_mask=mask)
    for row in range(2):
        short = op(q[row : row + 1], *(x[row : row + 1][:, :, mask[row]] for x in (k, v)))
        assert torch.allclose(found[row : row + 1], short, atol=EXACT)


def test_windowed_positions_join_keys_of_equal_content():
    """Copies of three keys, rotated by their places: unrotated they are three clusters of radius zero, so that what is
    left is softmax with every closed key at the one distance."""
    q, k, v = gaussian(24)
    content = k[:, :, :3].repeat(1, 1, 8, 1)
    rope = Rope(8, 24, base=100.0).double()
    rotated_q, rotated_k = rope.rotate(q, content)
    op = operator(num_keys=1, num_clusters=3, window=24, rope_base=100.0, rope_distance=5)
    far = torch.cat([rope.rotate(x, x, offset=5)[0] for x in q.split(1, 2)], 2)
    # The angles of `Rope` are rounded to float32, those of the operator are not.
    assert torch.allclose(op(rotated_q, rotated_k, v), softmax_naive(far, content, v), atol=1e-6)
    blind = operator(num_keys=1, num_clusters=3, window=24)(rotated_q, rotated_k, v)
    assert (blind - softmax_naive(far, content, v)).norm() > 0.01


def test_score_of_all_clusters_follows_the_centers():
    """The survey divides a cluster's e^{s<q, c>} by the mass of the others, which makes a large cluster win over one
    nearer to the query. The order here is that of <q, c>, or of the mass if it is asked for."""
    near, crowd = torch.tensor([1.5, 0.0]), torch.tensor([1.0, 0.0])
    k = torch.stack([near, *[crowd + 1e-3 * torch.tensor([0.0, j - 4.5]) for j in range(10)]])[None, None].double()
    q, v = torch.tensor([[[[1.0, 0.0]]]]).double(), torch.arange(11.0).double().view(1, 1, 11, 1)
    s, sizes = 2**-0.5, (1, 10)
    raw = [math.exp(s * 1.5), math.exp(s)]
    survey = [raw[0] / (sizes[1] * raw[1]), raw[1] / (sizes[0] * raw[0])]
    assert survey[1] > survey[0]
    for by_mass, best in ((False, 0), (True, 1)):
        op = Multipole(10, 2, 11, head_dim=2, num_heads=1, seed=0, by_mass=by_mass).double()
        field, (fine, _) = next(op.fields(q, k, v, False, None))
        opened = field.keys.clusters[0, 0, 0]
        assert sorted(fine.size[0, 0].tolist()) == [1, 10]
        assert fine.size[0, 0][opened].tolist() == [sizes[best]]


def test_cost_at_fixed_clusters_is_linear_and_grows_with_the_budget():
    def flops(n, num_keys):
        op = Multipole(num_keys, 16, 4096, head_dim=32, num_heads=1, seed=0)
        return measure_flops(op, *(x[:1, :1] for x in gaussian(n, head_dim=32, dtype=torch.float32))).flops

    lengths = (512, 1024, 2048)
    assert 0.95 < log_log_slope(lengths, [float(flops(n, 32)) for n in lengths]) < 1.05
    assert flops(512, 16) < flops(512, 64) < flops(512, 256)


def test_two_levels_score_fewer_clusters():
    """Of 512 clusters of 2 keys on average, a query scores 16 coarse ones and 64 fine ones."""
    inputs = [x[:1, :1] for x in gaussian(1024, head_dim=32, dtype=torch.float32)]
    make = partial(Multipole, 32, 512, 1024, head_dim=32, num_heads=1, seed=0, iterations=1)
    one, two = make(), make(num_coarse=16, num_fine=64)
    of_one, of_two = (measure_flops(op, *inputs).flops for op in (one, two))
    assert of_two < 0.7 * of_one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_keys": 0}, "`num_keys` must be at least 1, got 0"),
        ({"window": 0}, "`window` must be at least 1"),
        ({"block_size": 5}, "`block_size` must divide `window`"),
        ({"block_size": 2}, "`block_size` must divide `window`"),
        ({"num_coarse": 2}, "`num_coarse` and `num_fine` belong together"),
        ({"rope_distance": 2}, "`rope_base` and `rope_distance` belong together"),
        ({"num_coarse": 2, "num_fine": 4, "first_order": True}, "one level only"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        operator(**arguments)


def test_windowed_positions_need_the_places_of_both():
    q, k, v = gaussian(20)
    with pytest.raises(ValueError, match="`rope_base` needs as many queries as keys, got 3 and 20"):
        operator(rope_base=100.0, rope_distance=4)(q[:, :, :3], k, v)
