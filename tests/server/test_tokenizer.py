"""Pieces of text are whole characters, and together the whole text."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tokenizer import INCOMPLETE, Codec, Detokenizer


@pytest.fixture(scope="session")
def codec(spelling: Any) -> Codec:
    return Codec(spelling, vocab=len(spelling), context=None)


@pytest.mark.parametrize("text", ["naïve café", "東京 🙂🚀", " plain", "a\n b", "Ünïcödé 東"])
def test_pieces_are_whole_characters_and_together_the_text(codec: Codec, text: str) -> None:
    detokenizer = Detokenizer(codec.decode, codec.encode("Q: 東京", "prompt"))
    pieces = []
    for token in codec.encode(text, "prompt"):
        detokenizer.push(token)
        pieces.append(detokenizer.read())
    pieces.append(detokenizer.read(final=True))
    assert "".join(pieces) == text
    assert INCOMPLETE not in "".join(pieces)


def test_half_a_character_at_the_end_is_given_out_at_last(codec: Codec) -> None:
    *most, _ = codec.encode("🙂", "prompt")
    detokenizer = Detokenizer(codec.decode, (1,))
    for token in most:
        detokenizer.push(token)
        assert detokenizer.read() == ""
    assert detokenizer.read(final=True) == codec.decode(most)


def test_bytes_that_never_become_a_character_do_not_wait_for_ever(codec: Codec) -> None:
    alone = codec.encode("🙂", "prompt")[-1]  # a byte that only goes on what another has begun
    detokenizer = Detokenizer(codec.decode, codec.encode("Q:", "prompt"))
    pieces = []
    for _ in range(12):
        detokenizer.push(alone)
        pieces.append(detokenizer.read())
    assert "".join(pieces) == INCOMPLETE * 9
    assert detokenizer.read(final=True) == INCOMPLETE * 3


@pytest.mark.parametrize("seed", range(4))
def test_a_long_text_without_characters_is_not_decoded_over_and_over(codec: Codec, seed: int) -> None:
    decoded = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return codec.decode(ids)

    number = random.Random(seed)
    parts = sorted({token for text in ("🙂", "東", "é") for token in codec.encode(text, "prompt")})
    whole = codec.encode("Q: What is é, 東京?", "prompt")
    tokens: list[int] = []
    while len(tokens) < 2000:  # mostly bytes that go on nothing, or that nothing goes on
        tokens += number.choices(parts[: 1 + seed], k=number.randint(1, 300))
        tokens += whole[: number.randint(0, len(whole))]
    detokenizer = Detokenizer(counting, (40, 41))
    pieces = []
    for token in tokens:
        detokenizer.push(token)
        pieces.append(detokenizer.read())
    pieces.append(detokenizer.read(final=True))
    assert "".join(pieces) == codec.decode(tokens)
    assert decoded < 200 * len(tokens)


@given(st.data())
def test_any_tokens_read_in_any_steps_give_the_decoded_text(codec: Codec, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 319), max_size=30))
    detokenizer = Detokenizer(codec.decode, (40, 41))
    text = ""
    for token in tokens:
        detokenizer.push(token)
        if data.draw(st.booleans()):
            text += detokenizer.read()
    assert text + detokenizer.read(final=True) == codec.decode(tokens)
