"""Tokens: nothing of a text is lost, and the saved file says the same as the encoder."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from attnlens.data.tokens import BytePairs, Characters

TRAINING = ["To be, or not to be:\n  that is the question.\n" * 20, "Whether 'tis nobler in the mind to suffer\n" * 20]


@pytest.fixture(params=[Characters(), BytePairs(300)], ids=["characters", "byte_pairs"])
def encoder(request):
    return request.param.fit(TRAINING)


@pytest.mark.parametrize("text", [TRAINING[0][:77], " not  the\n\nquestion ", ""])
def test_the_saved_file_agrees_and_decodes_to_the_text(encoder, text):
    ids, ends = encoder.encode(text)
    saved = Tokenizer.from_str(encoder.to_json())
    assert saved.encode(text).ids == ids.tolist()
    assert saved.decode(ids.tolist()) == text
    assert len(ends) == len(ids)


def test_ends_cover_the_text_in_order(encoder):
    ids, ends = encoder.encode(TRAINING[1])
    assert ends[-1] == len(TRAINING[1])
    assert (np.diff(ends) >= 1).all()
    assert ids.max() < encoder.vocabulary_size


def test_an_unseen_character_is_one_unknown_among_characters():
    encoder = Characters().fit(["abc"])
    assert encoder.encode("aZ☺c")[0].tolist() == [1, 0, 0, 3]


def test_an_unseen_character_is_its_bytes_among_byte_pairs():
    encoder = BytePairs(256).fit(TRAINING)
    ids, ends = encoder.encode("be☺")
    assert len(ids) == 2 + 3
    assert ends[-1] == 3
    assert Tokenizer.from_str(encoder.to_json()).decode(ids.tolist()) == "be☺"


def test_byte_pairs_are_the_same_each_time_and_shorten():
    first, again = (BytePairs(300).fit(TRAINING) for _ in range(2))
    assert first.to_json() == again.to_json()
    assert first.vocabulary_size == 300
    assert len(first.encode(TRAINING[0])[0]) < len(TRAINING[0]) / 2


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="`vocabulary_size` is 100: choose 256"):
        BytePairs(100)
