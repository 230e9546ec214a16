"""N-gram baselines: probabilities, counts by hand, and the limit in which counting is all there is to know."""

import numpy as np
import pytest

from attnlens.data import ngram

V = 7


@pytest.fixture
def works():
    rng = np.random.default_rng(0)
    # A Markov chain, so that histories matter.
    table = rng.dirichlet(np.full(V, 0.3), size=V)
    chain = [0]
    for _ in range(3000):
        chain.append(int(rng.choice(V, p=table[chain[-1]])))
    return [np.asarray(chain[:2000]), np.asarray(chain[2000:])]


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("history", [[], [3], [1, 2, 3, 4], [6, 6, 6, 6, 6]])
def test_probabilities_sum_to_one_for_every_history(works, order, history):
    """Seen and unseen histories, and those shorter than the order."""
    model = ngram.fit([work[work < V - 1] for work in works], V, 5)
    p = [ngram.probabilities(model, np.asarray([*history, symbol]), order)[-1] for symbol in range(V)]
    assert min(p) > 0
    assert sum(p) == pytest.approx(1, abs=1e-12)


def test_the_bigram_is_the_formula_by_hand():
    """Text 0 1 0 1 0 2 has too few counts of counts, so the stated discounts .5, .75, 1 hold."""
    model = ngram.fit([np.asarray([0, 1, 0, 1, 0, 2])], 3, 2)
    # Symbols in front: 0 follows {1}, 1 follows {0}, 2 follows {0}: three types, each counted once.
    unigram = (1 - 0.5) / 3 + (3 * 0.5 / 3) / 3
    # After 0: 1 twice (discount .75), 2 once (discount .5).
    expected = (2 - 0.75) / 3 + (0.75 + 0.5) / 3 * unigram
    assert ngram.probabilities(model, np.asarray([0, 1]), 2)[1] == pytest.approx(expected, abs=1e-15)


def test_grams_do_not_cross_works():
    apart = ngram.fit([np.asarray([0, 1, 0, 1]), np.asarray([2, 3, 2, 3])], 4, 2)
    assert 1 * 4 + 2 not in apart.true[1].grams


def test_more_history_helps_on_a_chain_and_reaches_its_entropy(works):
    targets = [np.ones(len(work), dtype=bool) for work in works[1:]]
    bits = ngram.bits_per_symbol(works[:1], works[1:], targets, V)
    assert bits["bigram"] < bits["unigram"] - 0.2
    # The chain has a memory of one: longer histories only cost a little.
    assert bits["5-gram"] == pytest.approx(bits["bigram"], abs=0.2)


def test_only_targets_count(works):
    model = ngram.fit(works, V, 5)
    target = np.zeros(len(works[1]), dtype=bool)
    target[10:20] = True
    bits = ngram.bits_per_symbol(works, works[1:], [target], V)
    assert bits["trigram"] == pytest.approx(-np.log2(ngram.probabilities(model, works[1], 3)[10:20]).mean(), abs=1e-12)


def test_a_periodic_text_costs_nothing_once_the_history_tells():
    period = np.tile([0, 1, 0, 2], 500)
    bits = ngram.bits_per_symbol([period], [period], [np.ones(len(period), dtype=bool)], 3)
    assert bits["unigram"] == pytest.approx(1.5, abs=0.01)
    assert bits["trigram"] < 0.02


def test_orders_out_of_range_are_refused(works):
    with pytest.raises(ValueError, match="`max_order` is 0"):
        ngram.fit(works, V, 0)
    with pytest.raises(ValueError, match="`max_order` is 23"):
        ngram.fit(works, V, 23)
    with pytest.raises(ValueError, match="`order` is 3"):
        ngram.probabilities(ngram.fit(works, V, 2), works[0], 3)
