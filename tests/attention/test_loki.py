"""Loki: its limits, the score bound and what it guarantees for the mass kept, calibration and its state."""

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.analysis.flops import count_flops
from attnlens.attention import build
from attnlens.attention.loki import Loki, principal_directions
from attnlens.attention.softmax import softmax_naive, softmax_weights
from attnlens.attention.topk import TopK
from attnlens.linalg.selected import ROWS
from attnlens.testing.inputs import gaussian


def loki(num_keys, rank, head_dim=8):
    return Loki(num_keys, rank, head_dim, 2).double()


def stretched(length, seed=0, **arguments):
    """Gaussian inputs whose keys, and so queries that ask for them, are long in a few skew directions."""
    q, k, v = gaussian(length, seed=seed, **arguments)
    turn = torch.linalg.qr(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q
    stretch = torch.tensor([2.5, 2.0, 1.0, 0.4, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64)
    return q * 1.5, (k * stretch) @ turn, v


def naive(q, k, v, basis, num_keys, causal):
    """The formula with dense scores and a dense mask."""
    scores = (q @ basis) @ (k @ basis).mT
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1) & causal
    index = scores.masked_fill(hidden, -torch.inf).topk(num_keys).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True) & ~hidden
    exact = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~chosen, -torch.inf)
    return torch.softmax(exact, -1) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [20, ROWS + 20])
def test_equals_the_dense_formula_forward_and_backward(length, causal):
    tensors = [x.requires_grad_() for x in stretched(length, value_dim=5)]
    operator = loki(4, 3)
    operator.fit(tensors[1])
    found = operator(*tensors, causal=causal)
    expected = naive(*tensors, operator.basis[..., :3], 4, causal)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * cotangent).sum(), tensors),
        torch.autograd.grad((expected * cotangent).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("causal", [False, True])
def test_full_rank_is_top_k_and_all_keys_are_softmax(causal):
    q, k, v = stretched(40)
    full, every = loki(5, 8), loki(40, 1)
    full.fit(k)
    torch.testing.assert_close(full(q, k, v, causal=causal), TopK(5)(q, k, v, causal=causal), atol=1e-12, rtol=0)
    exact = softmax_naive(q, k, v, causal=causal)
    torch.testing.assert_close(every(q, k, v, causal=causal), exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 7, 8])
def test_score_error_is_within_its_bound(rank, fitted):
    """|<q, R k>| <= |R q| |R k| <= |q| |R k|."""
    q, k, _ = stretched(30)
    operator = loki(4, rank)
    if fitted:
        operator.fit(k)
    scores, bound = operator.scores(q, k)
    basis = operator.basis[..., :rank]
    left_over = (k - k @ basis @ basis.mT).norm(dim=-1)[..., None, :]
    error = (scores - q @ k.mT).abs()
    assert (error <= bound + 1e-12).all()
    assert (bound <= q.norm(dim=-1)[..., None] * left_over + 1e-12).all()
    assert rank == 8 or error.max() > 1e-3, "the bound is not trivially met"


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_mass_kept_is_within_the_score_error_of_the_best(rank):
    """mass(loki) >= exp(-2 s e_i) mass(top-k), e_i the largest score error of the row."""
    q, k, _ = stretched(60)
    operator = loki(6, rank)
    operator.fit(k)
    exact, scores = softmax_weights(q, k), operator.scores(q, k)[0]
    kept = exact.gather(-1, scores.topk(6).indices).sum(-1)
    best = exact.topk(6).values.sum(-1)
    worst = (scores - q @ k.mT).abs().amax(-1) * 8**-0.5
    assert (kept >= torch.exp(-2 * worst) * best - 1e-12).all()
    assert rank == 6 or (kept < best - 1e-9).any(), "the choice differs from the exact one"


def test_the_basis_is_the_best_for_the_keys_and_its_energy_is_reported():
    """No other basis of that rank, leading coordinates included, leaves less of the calibration keys."""
    _, k, _ = stretched(200)
    operator = loki(6, 3)
    energy = operator.fit(k)
    basis = operator.basis
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8).double().expand(2, 8, 8), atol=1e-12, rtol=0)

    def left(directions):
        return (k - k @ directions @ directions.mT).square().sum((0, 2, 3))

    share = 1 - left(basis[..., :3]) / k.square().sum((0, 2, 3))
    torch.testing.assert_close(energy[:, 2], share, atol=1e-12, rtol=0)
    torch.testing.assert_close(energy[:, -1], torch.ones(2).double(), atol=1e-12, rtol=0)
    for seed in range(20):
        draw = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (left(basis[..., :3]) <= left(torch.linalg.qr(draw).Q)).all()
    assert (left(basis[..., :3]) < left(torch.eye(8).double()[:, :3])).all()


def test_calibration_raises_the_skill_on_new_inputs():
    """Fitted on one draw, used on another; the leading coordinates are no better than any three."""
    q, k, v = stretched(200, seed=1)
    exact = softmax_naive(q, k, v)
    operator = loki(20, 3)
    before = (operator(q, k, v) - exact).norm()
    operator.fit(stretched(200, seed=2)[1])
    after, oracle = (operator(q, k, v) - exact).norm(), (TopK(20)(q, k, v) - exact).norm()
    assert after < 0.5 * before
    assert after < 2 * oracle


def test_padding_takes_no_part_in_the_calibration():
    _, k, _ = stretched(30)
    mask = torch.arange(30) < torch.tensor([30, 11])[:, None]
    poisoned = k.masked_fill(~mask[:, None, :, None], torch.nan)
    real = torch.cat([k[:1], k[1:, :, :11]], 2)
    for found, expected in zip(principal_directions(poisoned, mask), principal_directions(real), strict=True):
        torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-10, rtol=0)


def test_the_basis_is_saved_and_the_default_is_the_leading_coordinates():
    q, k, v = stretched(30)
    fitted, other = loki(4, 2), loki(4, 2)
    torch.testing.assert_close(other.basis, torch.eye(8).double().expand(2, 8, 8))
    fitted.fit(k)
    assert not torch.equal(fitted(q, k, v), other(q, k, v))
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(fitted(q, k, v), other(q, k, v))
    assert not list(fitted.parameters()), "calibrated, never trained"


def test_every_operator_is_charged_and_fewer_directions_cost_less():
    q, k, v = gaussian(ROWS + 72, batch=1)
    for causal in (False, True):
        low, full = (count_flops(lambda *x, r=r, causal=causal: loki(4, r)(*x, causal=causal), q, k, v) for r in (2, 8))
        assert low < full


def test_the_config_and_bad_values():
    config = OmegaConf.load("conf/attention/loki.yaml")
    size = {"head_dim": 8, "num_heads": 2, "max_length": 128}
    operator = build(config, **size)
    with pytest.raises(ValueError, match="`num_keys`"):
        build(config, **size, num_keys=0)
    with pytest.raises(ValueError, match="`rank`"):
        build(config, **size, rank=0)
    with pytest.raises(ValueError, match="`keys` must have"):
        operator.fit(torch.ones(1, 3, 5, 8))
    with pytest.raises(ValueError, match="`keys` must hold"):
        operator.fit(torch.zeros(1, 2, 5, 8))
