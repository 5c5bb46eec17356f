"""A text becomes the same tokens wherever it is read, and no beginning-of-text token twice."""

from typing import Any

import pytest

from steering.errors import TextError
from steering.text import encode, render_chat
from tests.training.helpers import END, make_tokenizer

BEGIN = "<|begin|>"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}assistant:"
)
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is red? "}]


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


def test_a_conversation_is_rendered_up_to_the_next_answer() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    assert render_chat(tokenizer, TURNS) == "<|system|>Be brief.<|end|><|user|>What is red? <|end|><|assistant|>"


def test_a_template_that_wants_parts_gets_parts() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PARTS
    assert render_chat(tokenizer, TURNS) == "system:Be brief.user:What is red? assistant:"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template"),
        ("assistant:", "it leaves out what the user says"),
        ("{{ raise_exception('no system turns') }}", "no system turns"),
    ],
)
def test_a_template_that_is_missing_or_says_nothing_is_refused(template: str | None, said: str) -> None:
    tokenizer: Any = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TextError, match=said):
        render_chat(tokenizer, TURNS)
