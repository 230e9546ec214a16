"""Windows: each label is the next token of its work, and baselines are measured on what the labels cover."""

import numpy as np
import pytest

from attnlens.data.text import cut, language_modeling
from attnlens.data.tokens import BytePairs, Characters

RNG = np.random.default_rng(0)
WORKS = ["".join(RNG.choice(list("abcdefgh \n"), size=size)) for size in (203, 64, 31)]


@pytest.mark.parametrize("tokenizer", [Characters(), BytePairs(260)], ids=["characters", "byte_pairs"])
@pytest.mark.parametrize("limit", [None, 3])
def test_labels_are_the_next_tokens_of_one_work(tokenizer, limit):
    encoder = tokenizer.fit(WORKS)
    windows = cut(WORKS, encoder, 8, limit)
    encoded = [encoder.encode(text)[0] for text in WORKS]
    for inputs, labels in zip(windows.columns["input_ids"], windows.columns["labels"], strict=True):
        assert np.array_equal(inputs[1:], labels[:-1])
        found = [
            ids[start : start + 9].tolist() == [inputs[0], *labels]
            for ids in encoded
            for start in range(0, len(ids) - 8, 8)
        ]
        assert any(found)


def test_without_a_limit_every_character_but_the_first_and_the_rest_is_a_label_once():
    windows = cut(WORKS, Characters().fit(WORKS), 8, None)
    assert len(windows.columns["labels"]) == 25 + 7 + 3
    for text, target in zip(WORKS, windows.targets, strict=True):
        covered = (len(text) - 1) // 8 * 8
        assert not target[0]
        assert target[1 : covered + 1].all()
        assert not target[covered + 1 :].any()


def test_targets_are_the_characters_of_the_labels_among_byte_pairs_too():
    encoder = BytePairs(280).fit(WORKS)
    windows = cut(WORKS, encoder, 4, 5)
    covered = "".join(
        text[i] for text, target in zip(WORKS, windows.targets, strict=True) for i in np.flatnonzero(target)
    )
    assert encoder.tokenizer.decode(windows.columns["labels"].ravel().tolist()) == covered


def test_a_limit_spreads_over_all_works():
    windows = cut(WORKS, Characters().fit(WORKS), 8, 7)
    assert len(windows.columns["labels"]) == 7
    assert windows.targets[0].any()
    assert windows.targets[1].any()


def prepare(test: list[str], tokenizer=None):
    return language_modeling(
        {"train": WORKS, "validation": WORKS[:1], "test": test},
        tokenizer=tokenizer or Characters(),
        length=8,
        max_validation_windows=4,
        max_test_windows=100,
        sources={"here": "0"},
    )


def test_characters_per_token_counts_what_labels_cover():
    assert prepare(WORKS[1:]).meta.characters_per_token == 1
    bpe = prepare(WORKS[1:], BytePairs(300))
    assert bpe.meta.characters_per_token > 1
    assert bpe.meta.characters_per_token * bpe.splits["test"]["labels"].size == bpe.meta.sources["test_characters"]


def test_unknown_test_characters_are_counted_and_cost_the_baselines():
    known, unknown = prepare(["abcdefgh" * 4 + "a"]), prepare(["abcdeZgh" * 4 + "a"])
    assert known.meta.sources["unknown_test_characters"] == 0
    assert unknown.meta.sources["unknown_test_characters"] == 4
    assert unknown.meta.baselines["unigram"] > known.meta.baselines["unigram"]


def test_texts_shorter_than_a_window_are_refused():
    with pytest.raises(ValueError, match="`length` is 8"):
        prepare(["abcdefgh"])
    with pytest.raises(ValueError, match="a limit of 0"):
        cut(WORKS, Characters().fit(WORKS), 8, 0)
