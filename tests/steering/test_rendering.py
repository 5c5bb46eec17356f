"""A text becomes the same tokens wherever it is read, and no beginning-of-text token twice."""

import pytest

from steering.errors import TextError
from steering.text import encode
from tests.training.helpers import END, make_tokenizer

BEGIN = "<|begin|>"


def test_text_gets_the_special_tokens_of_the_tokenizers_own_rule() -> None:
    tokenizer = make_tokenizer(BEGIN)
    assert encode(tokenizer, "Q: What?") == tokenizer("Q: What?").input_ids
    assert encode(tokenizer, "Q: What?")[0] == tokenizer.bos_token_id
    assert encode(tokenizer, "Q: What?", add_special_tokens=False) == tokenizer("Q: What?").input_ids[1:]
    assert encode(tokenizer, "") == [tokenizer.bos_token_id]


@pytest.mark.parametrize("closed", [False, True])
def test_a_text_that_begins_with_the_token_does_not_get_it_again(closed: bool) -> None:
    tokenizer = make_tokenizer(BEGIN, closed=closed)
    assert tokenizer(f"{BEGIN}Q").input_ids[:2] == [tokenizer.bos_token_id] * 2, "what a tokenizer by itself does"
    assert encode(tokenizer, f"{BEGIN}Q: What?") == encode(tokenizer, "Q: What?")


def test_what_is_written_twice_is_there_twice() -> None:
    tokenizer = make_tokenizer(BEGIN)
    begin = tokenizer.bos_token_id
    assert encode(tokenizer, f"{BEGIN}{BEGIN}Q")[:2] == [begin, begin]
    assert encode(tokenizer, f"{BEGIN}{BEGIN}Q") == encode(tokenizer, f"{BEGIN}{BEGIN}Q", add_special_tokens=False)
    plain = make_tokenizer()  # adds nothing in front
    assert encode(plain, f"{END}{END}Q") == plain(f"{END}{END}Q").input_ids


def test_a_token_in_front_counts_whatever_the_tokenizer_calls_it() -> None:
    tokenizer = make_tokenizer(BEGIN)
    begin = tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert encode(tokenizer, f"{BEGIN}Q")[:2] == [begin, tokenizer("Q").input_ids[1]]


def test_half_a_surrogate_pair_is_named() -> None:
    with pytest.raises(TextError, match=r"the text holds \\ud83d, half of a surrogate pair"):
        encode(make_tokenizer(), "Q: \ud83d")
