"""A text ends with the first stop string that is complete, whatever the tokens are and whether they are shown."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.engine.sequence import FinishReason, SampledToken, SamplingParams, Timing
from server.engine.sequence import Sequence as EngineSequence
from server.engine.sequence_output import SequenceOutput
from server.engine.text_builder import Decoders
from server.tokenizer import INCOMPLETE, Codec
from tests.server.conftest import END

WORDS = ["<|im_end|>", "<s>", "a", "b", "ab", "ba", "<", "|", "im_end", "|>", "é", " ", "\n", "ab<"]
SPECIAL = {0, 1}
EOS = 1


def decode(ids: Sequence[int]) -> str:
    return "".join(WORDS[one] for one in ids if one not in SPECIAL)


def decode_all(ids: Sequence[int]) -> str:
    return "".join(WORDS[one] for one in ids)


PLAIN = Decoders(decode, decode_all, SPECIAL.__contains__)
NO_TIME = Timing(0, 0, 0)


def run(
    tokens: Sequence[int], both: Decoders = PLAIN, *, eos: frozenset[int] = frozenset({EOS}), **rules: Any
) -> tuple[str, FinishReason, list[str], int]:
    """Text, reason, the pieces that are streamed, and how many tokens were taken."""
    rules = {"max_new_tokens": max(1, len(tokens))} | rules
    sequence = EngineSequence("r", 0, (2, 3), SamplingParams(**rules), stream=True)
    output = SequenceOutput(sequence, eos, both)
    pieces: list[str] = []
    for count, token in enumerate(tokens, 1):
        sampled = SampledToken(token)
        if reason := output.accept(sampled):
            finished = output.finish(reason, 0, NO_TIME)
            pieces.append(output.token_event(sampled, last=True).text)
            return finished.text, finished.finish_reason, pieces, count
        pieces.append(output.token_event(sampled, last=False).text)
    finished = output.finish("cancelled", 0, NO_TIME)
    return finished.text, finished.finish_reason, pieces, len(tokens)


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


@pytest.mark.parametrize(
    ("stop", "words", "text", "whole", "count"),
    [
        # is a special token
        (("<|im_end|>",), ["a", "b", "<|im_end|>", "a"], "ab", "ab", 3),
        # begins with one
        (("<|im_end|>\n",), ["a", "<|im_end|>", "b", "<|im_end|>", "\n", "a"], "ab", "a<|im_end|>b", 5),
        # begins with one, and is held back over several tokens
        (("<|im_end|>ba\n",), ["a", "<|im_end|>", "b", "<|im_end|>", "b", "a", "\n"], "ab", "a<|im_end|>b", 7),
        # ends with one
        (("b<|im_end|>",), ["a", "<|im_end|>", "b", "<|im_end|>", "a"], "a", "a<|im_end|>", 4),
        # contains one
        (("b<|im_end|>a",), ["a", "b", "<|im_end|>", "b", "<|im_end|>", "a"], "ab", "ab<|im_end|>", 6),
        # two of them, of which the second one ends the text by itself
        (("b<|im_end|><s>",), ["a", "b", "<|im_end|>", "<s>"], "a", "a", 4),
        # is a part of one
        (("im_end",), ["a", "<|im_end|>", "b"], "a", "a<|", 2),
        # begins in the middle of one
        (("|>a",), ["a", "<|im_end|>", "b", "<|im_end|>", "a"], "ab", "a<|im_end|>b<|im_end", 5),
        # ends in the middle of one
        (("ab<|im",), ["b", "ab", "<|im_end|>"], "b", "b", 3),
        # is spelled with other tokens
        (("<|im_end|>",), ["a", "<", "|", "im_end", "|>", "b"], "a", "a", 5),
        # is the token that ends the text anyway
        (("<s>",), ["a", "b", "<s>"], "ab", "ab", 3),
        # stands behind a special token
        (("never", "ba"), ["a", "<|im_end|>", "ab", "ab", "a"], "aa", "a<|im_end|>a", 4),
    ],
)
@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_may_be_begin_with_or_contain_a_special_token(
    stop: tuple[str, ...], words: list[str], text: str, whole: str, count: int, skip: bool
) -> None:
    found, reason, pieces, taken = run(ids(*words), stop=stop, skip_special_tokens=skip)
    assert (found, reason, taken) == (text if skip else whole, "stop", count)
    assert "".join(pieces) == found


def test_a_stop_string_in_the_text_that_is_shown_ends_it_also_across_a_token_that_is_not() -> None:
    words = ids("b", "ab", "<|im_end|>", "a", "b")
    assert run(words, stop=("aba",))[0] == "b"
    assert run(words, stop=("aba",), skip_special_tokens=False)[:2] == ("bab<|im_end|>ab", "length")


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({}, "ab"),
        ({"skip_special_tokens": False}, "a<|im_end|>b"),
        ({"include_stop_str_in_output": True}, "ab"),  # as in vLLM: a special token that ends it is not shown
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "a<|im_end|>b<s>"),
        ({"stop": ("<s>",), "include_stop_str_in_output": True}, "ab<s>"),  # but a stop string is
        ({"stop": ("b<s>",), "include_stop_str_in_output": True}, "ab<s>"),
        ({"stop": ("b<s>",)}, "a"),
        ({"stop": ("<|im_end|>",), "include_stop_str_in_output": True}, "a<|im_end|>"),
        ({"stop": ("a<|im",), "include_stop_str_in_output": True}, "a<|im"),
        ({"stop": ("<|im_end|>", "im"), "include_stop_str_in_output": True}, "aim"),  # complete before the other one
        ({"stop": ("|>", "<|im_end|>"), "include_stop_str_in_output": True}, "a<|im_end|>"),  # both complete at once
        ({"stop_token_ids": (3,)}, "a"),
        ({"stop_token_ids": (3,), "include_stop_str_in_output": True}, "ab"),
        ({"stop_token_ids": (3,), "stop": ("b",)}, "a"),
        ({"stop_token_ids": (3,), "stop": ("never",)}, "a"),
        ({"stop_token_ids": (3,), "stop": ("never",), "include_stop_str_in_output": True}, "ab"),
        ({"stop_token_ids": (0,), "include_stop_str_in_output": True, "skip_special_tokens": False}, "a<|im_end|>"),
        ({"ignore_eos": True}, "aba"),
        ({"ignore_eos": True, "skip_special_tokens": False}, "a<|im_end|>b<s>a"),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, "ab"),
        ({"ignore_eos": True, "stop": ("<s>",)}, "ab"),
    ],
)
def test_what_ends_a_text_is_shown_where_it_is_asked_for(rules: dict[str, Any], text: str) -> None:
    found, _, pieces, _ = run(ids("a", "<|im_end|>", "b", "<s>", "a"), **rules)
    assert found == text
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("least", "stop", "text", "count"),
    [
        (0, ("b",), "a", 2),
        (2, ("b",), "a", 2),
        (3, ("b",), "aba", 4),
        (4, ("ba",), "aba", 5),  # the one that the third token completes comes too early
        (5, ("bab",), "aba", 6),
        (7, ("ab",), "ababab", 8),
        (7, ("b<|im_end|>",), "ababa", 7),
        (8, ("b<|im_end|>", "b"), "abababa", 8),
    ],
)
def test_before_min_tokens_no_stop_string_ends_the_text(
    least: int, stop: tuple[str, ...], text: str, count: int
) -> None:
    words = ids("a", "b", "a", "b", "a", "b", "<|im_end|>", "ab", "ab")
    found, reason, pieces, taken = run(words, stop=stop, min_tokens=least)
    assert (found, reason, taken) == (text, "stop", count)
    assert "".join(pieces) == found


def test_a_text_that_is_too_short_by_its_length_ends_with_it() -> None:
    assert run(ids("a", "b"), stop=("ab",), min_tokens=5, max_new_tokens=2)[:2] == ("ab", "length")


def test_a_stop_string_that_was_complete_too_early_does_not_end_the_text_at_its_end() -> None:
    assert run(ids("a", "b"), stop=("b",), min_tokens=3, max_new_tokens=2)[:2] == ("ab", "length")


def test_half_a_character_behind_a_stop_string_is_not_shown() -> None:
    words = [b"a", b"b\xe6", b"\x97\xa5"]

    def spelled(ids: Sequence[int]) -> str:
        return b"".join(words[one - 2] for one in ids).decode(errors="replace")

    both = Decoders(spelled, spelled, lambda token: False)
    for include in (False, True):
        rules: Any = {"stop": ("b",), "include_stop_str_in_output": include}
        text, reason, pieces, taken = run([2, 3, 4], both, eos=frozenset(), **rules)
        assert (text, reason, taken) == ("ab" if include else "a", "stop", 2)
        assert "".join(pieces) == text


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the stop string begins that is complete first, and which: character by character."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


@st.composite
def texts_with_stops(draw: st.DrawFn) -> tuple[list[int], tuple[str, ...]]:
    """Tokens, and stop strings of which many are in their text, with special tokens or without."""
    tokens = draw(st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=12))
    found = []
    for text in (decode(tokens), decode_all(tokens)):
        begin = draw(st.integers(0, len(text)))
        found.append(text[begin : begin + draw(st.integers(1, 16))])
    made = draw(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map("".join), max_size=2))
    stops = draw(st.permutations([*found, *made]))[: draw(st.integers(1, 3))]
    return tokens, tuple(filter(None, stops)) or ("ab",)


@given(texts_with_stops(), st.booleans(), st.booleans())
def test_a_streamed_text_is_the_whole_one_and_ends_before_its_first_stop_string(
    text_with_stops: tuple[list[int], tuple[str, ...]], include: bool, skip: bool
) -> None:
    tokens, stops = text_with_stops
    rules: Any = {"stop": stops, "include_stop_str_in_output": include, "skip_special_tokens": skip}
    text, reason, pieces, taken = run(tokens, eos=frozenset(), **rules)
    assert "".join(pieces) == text, "nothing is taken back, nothing is missing"
    shown = decode(tokens[:taken]) if skip else decode_all(tokens[:taken])
    whole = decode_all(tokens[:taken])
    if reason != "stop":
        assert text == shown
        assert not any(stop in shown or stop in whole for stop in stops)
        return
    assert not any(stop in decode_all(tokens[: taken - 1]) for stop in stops), "it has not ended too late"
    assert not skip or not any(stop in decode(tokens[: taken - 1]) for stop in stops)
    ended = max((stop for stop in stops if include and text.endswith(stop)), key=len, default="")
    body = text.removesuffix(ended)
    assert shown.startswith(body)
    if not include:
        assert not any(stop in text for stop in stops), "nothing of a stop string is shown"
    if not skip:
        found = first_stop(whole, stops)
        assert found is not None
        assert text == whole[: found[0]] + (found[1] if include else "")


@given(texts_with_stops(), st.booleans(), st.integers(0, 12))
def test_with_min_tokens_too(text_with_stops: tuple[list[int], tuple[str, ...]], include: bool, least: int) -> None:
    tokens, stops = text_with_stops
    rules: Any = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": least}
    text, reason, pieces, taken = run(tokens, eos=frozenset(), **rules)
    assert "".join(pieces) == text
    assert taken >= min(least, len(tokens))
    if reason != "stop":
        assert text == decode(tokens[:taken])


def metaspace() -> PreTrainedTokenizerFast:
    """A vocabulary as SentencePiece makes it: a space belongs to the token behind it, and the first one is dropped."""
    words = [END, "a", "b", "▁a", "▁b", "▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


POOL = [END, "end", "🙂", "é", "a", "b", " ", " b", " sky", "\ufffd", "l", "<", ">b"]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@given(data=st.data())
def test_with_a_real_tokenizer_its_spaces_and_its_unfinished_characters(
    spelling: Any, kind: str, data: st.DataObject
) -> None:
    tokenizer = spelling if kind == "byte-level" else metaspace()
    codec = Codec(tokenizer, vocab=len(tokenizer), context=None)
    both = Decoders(codec.decode, codec.decode_all, lambda token: token == 0)
    parts = [*codec.encode("🙂é", "prompt"), *codec.encode(" blue sky", "prompt"), 0]
    parts = parts if kind == "byte-level" else [*range(len(tokenizer))]
    tokens = data.draw(st.lists(st.sampled_from(parts), min_size=1, max_size=14))
    stops = tuple(data.draw(st.lists(st.lists(st.sampled_from(POOL), min_size=1, max_size=2).map("".join), max_size=3)))
    skip = data.draw(st.booleans())
    text, reason, pieces, taken = run(tokens, both, eos=frozenset(), stop=stops, skip_special_tokens=skip)
    assert "".join(pieces) == text
    whole = run(tokens[:taken], both, eos=frozenset(), skip_special_tokens=skip)[0]
    assert whole.startswith(text.rstrip(INCOMPLETE)), "but for a character that the stop string has cut off"
    assert not any(stop in text for stop in stops)
    if reason != "stop":
        assert text == whole
        assert not any(stop in run(tokens, both, eos=frozenset(), skip_special_tokens=False)[0] for stop in stops)
