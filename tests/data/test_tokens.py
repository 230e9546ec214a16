"""Tokens: nothing of a text is lost, and the saved file says the same as the encoder."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from attnlens.data.tokens import BytePairs, Bytes, Characters, Words

TRAINING = ["To be, or not to be:\n  that is the question.\n" * 20, "Whether 'tis nobler in the mind to suffer\n" * 20]


@pytest.fixture(
    params=[Bytes(), Characters(), BytePairs(300), Words(100)], ids=["bytes", "characters", "byte_pairs", "words"]
)
def encoder(request):
    return request.param.fit(TRAINING)


@pytest.mark.parametrize("text", [TRAINING[0][:76], " not  to\n\n be ", ""])
def test_the_saved_file_agrees_and_decodes_to_the_text(encoder, text, tmp_path):
    ids, ends = encoder.encode(text)
    (tmp_path / "tokenizer.json").write_text(encoder.to_json(), encoding="utf-8")
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
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


def test_bytes_are_the_bytes_of_utf8_and_end_with_their_character():
    encoder = Bytes().fit(TRAINING)
    text = "na\u00efve \u263a\x00\U0001f600"
    ids, ends = encoder.encode(text)
    assert bytes(ids.tolist()) == text.encode()
    saved = Tokenizer.from_str(encoder.to_json())
    assert saved.encode(text).ids == ids.tolist()
    assert saved.decode(ids.tolist()) == text
    assert [end for _, end in saved.encode(text).offsets] == ends.tolist()


def test_words_are_the_most_frequent_with_the_space_before_them():
    encoder = Words(4).fit(["a b b c'd c'd c'd,\n", "b b"])
    ids, ends = encoder.encode(" b c'd b's <unk>b")
    # Four times " b", three times " c'd"; then "\n", "," and "a" and "b", once each: the first in Unicode is kept.
    assert Tokenizer.from_str(encoder.to_json()).get_vocab() == {"<unk>": 0, " b": 1, " c'd": 2, "\n": 3}
    assert ids.tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert ends.tolist() == [2, 6, 10, 11, 12, 15, 16, 17]


def test_unknown_words_are_one_token_each():
    encoder = Words(50).fit(TRAINING)
    ids, _ = encoder.encode(" not zounds to be")
    assert (ids == encoder.unknown).tolist() == [False, True, False, False]
    assert encoder.vocabulary_size <= 50


def test_a_vocabulary_without_a_word_is_refused():
    with pytest.raises(ValueError, match="`vocabulary_size` is 1: choose 2"):
        Words(1)
