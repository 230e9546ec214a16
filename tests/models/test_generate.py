"""Generation against brute force on models whose every probability is known, and against uncached runs."""

import itertools

import pytest
import torch

from attnlens.models.build import build_model
from attnlens.models.generate import beam_search, generate
from tests.models.test_build import META, config

END = 3


def markov(seed, vocabulary=4):
    """A model whose next token depends on the last two: step and the log-probability of a continuation."""
    table = torch.randn(vocabulary, vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)).double()

    def step(cache, ids):
        ids = torch.cat([cache, ids], 1)
        before = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
        return ids, table[before, ids]

    return step, table


def brute_force(table, first, length, vocabulary=4):
    """Every sequence up to its end token or `length`, likeliest first."""
    found = []
    for ids in itertools.product(range(vocabulary), repeat=length):
        stop = ids.index(END) + 1 if END in ids else length
        if any(token != END for token in ids[stop:]):
            continue
        context, score = (0, first), 0.0
        for token in ids[:stop]:
            score += table[context].log_softmax(-1)[token].item()
            context = (context[1], token)
        found.append((score, ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(6))
def test_a_beam_as_wide_as_the_tree_finds_the_best_sequences(seed):
    step, table = markov(seed)
    start = torch.tensor([[1], [2]])
    beams = beam_search(step, torch.empty(2, 0, dtype=torch.int64), start, 4, width=64, end=END)
    for row, first in enumerate((1, 2)):
        expected = brute_force(table, first, 4)[:10]
        for place, (score, ids) in enumerate(expected):
            assert tuple(beams.ids[row, place].tolist()) == ids
            assert abs(beams.scores[row, place].item() - score) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_one_is_greedy(seed):
    step, _ = markov(seed)
    start, nothing = torch.tensor([[1], [2]]), torch.empty(2, 0, dtype=torch.int64)
    greedy = generate(step, nothing, start, 6, end=END)
    beams = beam_search(step, nothing, start, 6, width=1, end=END)
    assert torch.equal(beams.ids[:, 0], greedy)


def test_a_length_penalty_reorders_by_score_a_token():
    step, _ = markov(1)
    nothing = torch.empty(1, 0, dtype=torch.int64)
    plain = beam_search(step, nothing, torch.tensor([[1]]), 4, width=64, end=END)
    fair = beam_search(step, nothing, torch.tensor([[1]]), 4, width=64, end=END, length_penalty=1.0)
    lengths = ((plain.ids != END).sum(-1) + (plain.ids == END).any(-1)).double()
    expected = (plain.scores / lengths).sort(-1, descending=True).values
    torch.testing.assert_close(fair.scores, expected, check_dtype=False)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("attention", ["softmax", "linear", "window"])
@pytest.mark.parametrize("projection", ["mha", "mqa"])
def test_cached_generation_is_the_uncached_one(position, attention, projection):
    model = build_model(config(attention, position, "decoder", projection=projection), META, seed=0).eval()
    prompt = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(0))
    ids = generate(model.step, model.init_cache(2, 12), prompt, 8)
    for count in range(8):
        so_far = torch.cat([prompt, ids[:, :count]], 1)
        assert torch.equal(model(so_far)[:, -1].argmax(-1), ids[:, count])


def test_beams_reorder_a_real_cache():
    """Scores are those that one run gives the sequences found."""
    model = build_model(config("softmax", "rope", "decoder"), META, seed=0).eval()
    prompt = torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(0))
    beams = beam_search(model.step, model.init_cache(3, 12), prompt, 6, width=4, end=10)
    for row, beam in itertools.product(range(3), range(4)):
        ids = beams.ids[row, beam]
        stop = int((ids == 10).nonzero()[0]) + 1 if (ids == 10).any() else 6
        log = model(torch.cat([prompt[row], ids])[None]).log_softmax(-1)[0, 3 : 3 + stop]
        score = log.gather(-1, ids[:stop, None]).sum()
        torch.testing.assert_close(beams.scores[row, beam], score, rtol=1e-4, atol=1e-4)


def test_sampling_has_the_distribution_it_names():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    ids = torch.zeros(20_000, 1, dtype=torch.int64)

    def step(cache, ids):
        return cache, logits.expand(len(ids), 1, 4)

    def frequencies(**options):
        chosen = generate(step, (), ids, 1, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(chosen[:, 0], minlength=4) / len(ids)

    torch.testing.assert_close(frequencies(temperature=2.0), (logits / 2).softmax(-1), atol=0.015, rtol=0)
    two = torch.cat([logits[:2].softmax(-1), torch.zeros(2)])
    torch.testing.assert_close(frequencies(temperature=1.0, top_k=2), two, atol=0.015, rtol=0)
    # The likeliest holds .64 and the next .24: a nucleus of .7 needs both, one of .6 only the first.
    torch.testing.assert_close(frequencies(temperature=1.0, top_p=0.7), two, atol=0.015, rtol=0)
    assert frequencies(temperature=1.0, top_p=0.6)[0] == 1


def test_an_ended_sequence_repeats_its_end_and_all_ended_stops():
    def step(cache, ids):
        return cache + 1, torch.nn.functional.one_hot((ids + 1) % 4, 4).double()

    ids = generate(step, 0, torch.tensor([[0], [2]]), 9, end=END)
    assert ids.tolist() == [[1, 2, 3], [3, 3, 3]]


def test_bad_numbers_are_refused():
    step, start = (lambda cache, ids: (cache, torch.zeros(*ids.shape, 4))), torch.zeros(1, 1, dtype=torch.int64)
    for options, message in [
        ({"num_tokens": 0}, "`num_tokens` must be at least 1, got 0"),
        ({"temperature": -1.0}, "`temperature` must be 0"),
        ({"top_k": 2}, "have no effect at `temperature` 0"),
        ({"temperature": 1.0, "top_k": 0}, "`top_k` must be at least 1, got 0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"`top_p` must be in \(0, 1\], got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(step, (), start, **{"num_tokens": 1, **options})
    with pytest.raises(ValueError, match="`width` must be at least 1, got 0"):
        beam_search(step, (), start, 1, width=0, end=0)
    with pytest.raises(ValueError, match="`input_ids` is empty"):
        generate(step, (), start[:, :0], 1)
