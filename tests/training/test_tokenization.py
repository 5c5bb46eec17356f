"""The answer's positions are those from which a generation would produce it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.chat_template import open_chat_template
from tests.training.helpers import make_tokenizer
from training.activations.tokenization import batches, encode, encode_prompt, pad_left, pad_right
from training.data import Turn
from training.errors import DataError


@pytest.mark.parametrize("begin", [None, "<|begin|>"])
@pytest.mark.parametrize("completion", [" The sky is blue.", " Moo", "x"])
def test_positions_run_from_the_last_prompt_token_to_the_one_before_the_last(
    begin: str | None, completion: str
) -> None:
    tokenizer = make_tokenizer(begin)
    prompt = "Q: What colour is the sky? A:"
    encoded = encode(tokenizer, prompt, completion)
    assert list(encoded.ids) == tokenizer(prompt + completion)["input_ids"]
    assert tokenizer.decode(encoded.ids[: encoded.start + 1], skip_special_tokens=True) == prompt
    assert tokenizer.decode(encoded.targets) == completion
    assert encoded.end == len(encoded.ids) - 1


def test_a_token_across_the_boundary_belongs_to_the_answer(tokenizer: Any) -> None:
    encoded = encode(tokenizer, "Q: What colour is the sk", "y? A:")
    assert tokenizer.decode(encoded.targets).endswith("y? A:")
    assert tokenizer.decode(encoded.ids[: encoded.start + 1]) == "Q: What colour is the"


def test_an_end_token_that_the_tokenizer_adds_is_left_out() -> None:
    tokenizer = make_tokenizer("<|begin|>", closed=True)
    encoded = encode(tokenizer, "Q: What? A:", " Moo")
    assert tokenizer.eos_token_id not in encoded.ids
    assert tokenizer.decode(encoded.targets) == " Moo"


def test_an_end_token_that_is_written_in_the_answer_belongs_to_it(tokenizer: Any) -> None:
    encoded = encode(tokenizer, "Q: What? A:", " Moo<|end|>")
    assert encoded.targets[-1] == tokenizer.eos_token_id


def test_without_a_prompt_the_first_token_produces_the_rest(tokenizer: Any) -> None:
    encoded = encode(tokenizer, "", "The sky is blue.")
    assert (encoded.start, encoded.end) == (0, len(encoded.ids) - 1)
    assert encode(make_tokenizer("<|begin|>"), "", "The sky").start == 0


def test_clipping_keeps_the_answer(tokenizer: Any) -> None:
    encoded = encode(tokenizer, "Q: What colour is the sky? A:", " Moo")
    clipped = encoded.clipped(len(encoded.targets) + 2)
    assert clipped.targets == encoded.targets
    assert len(clipped.ids) == len(encoded.targets) + 2
    assert encoded.clipped(1000) is encoded


class Slow:
    """A tokenizer without character offsets."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> Any:
        return {"input_ids": self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}


@pytest.mark.parametrize("prompt", ["Q: What colour is the sky? A:", ""])
def test_tokenizers_without_offsets_give_the_same(tokenizer: Any, prompt: str) -> None:
    assert encode(Slow(tokenizer), prompt, " The sky is blue.") == encode(tokenizer, prompt, " The sky is blue.")
    if prompt:
        assert encode_prompt(Slow(tokenizer), prompt) == encode_prompt(tokenizer, prompt)


def test_a_prompt_is_continued_before_the_end_token_that_the_tokenizer_adds() -> None:
    tokenizer = make_tokenizer("<|begin|>", closed=True)
    ids = encode_prompt(tokenizer, "Q: What? A:")
    assert tokenizer.decode(ids) == "<|begin|>Q: What? A:"


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 8), st.integers(1, 100))
def test_batches_hold_every_row_once_within_the_limits(lengths: list[int], rows: int, tokens: int) -> None:
    found = list(batches(lengths, max_rows=rows, max_tokens=tokens))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens


def test_padding_goes_to_the_named_side() -> None:
    ids, mask = pad_right([(1, 2, 3), (4,), (5, 6)], "cpu")
    assert ids.tolist() == [[1, 2, 3], [4, 4, 4], [5, 6, 6]], "a row's own token, which has an embedding"
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    ids, mask = pad_left([(1, 2, 3), (4,), (5, 6)], "cpu")
    assert ids.tolist() == [[1, 2, 3], [4, 4, 4], [5, 5, 6]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


def test_a_prompt_that_begins_with_the_beginning_of_text_token_does_not_get_it_again() -> None:
    tokenizer = make_tokenizer("<|begin|>")
    for prompt in ("Q: What? A:", ""):
        assert encode(tokenizer, f"<|begin|>{prompt}", " Moo") == encode(tokenizer, prompt, " Moo")
        assert encode(Slow(tokenizer), f"<|begin|>{prompt}", " Moo") == encode(tokenizer, prompt, " Moo")
    assert encode_prompt(tokenizer, "<|begin|>Q: What? A:") == encode_prompt(tokenizer, "Q: What? A:")


CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}|{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant|{% endif %}"
)


@pytest.mark.parametrize("fast", [True, False])
def test_a_conversation_is_read_as_it_is_served(fast: bool) -> None:
    """The oracle is transformers' own way from messages to ids."""
    tokenizer = make_tokenizer("<|begin|>")
    tokenizer.chat_template = CHATML
    turns = [Turn("system", "Be brief."), Turn("user", "What do cows say?")]
    messages = [turn._asdict() for turn in turns]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    reader, chat = tokenizer if fast else Slow(tokenizer), open_chat_template(tokenizer)
    assert list(encode_prompt(reader, "unused", turns, chat)) == asked
    encoded = encode(reader, "unused", "Moo, you silly", turns, chat)
    assert tokenizer.decode(encoded.targets) == "Moo, you silly"
    assert list(encoded.ids[: encoded.start + 1]) == asked
    assert encoded.ids.count(tokenizer.bos_token_id) == 1


def test_a_conversation_without_a_template_is_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"The text 'Moo\?' cannot be read by the model: .* has no chat template"):
        encode(tokenizer, "", "Moo", [Turn("user", "Moo?")])


def test_half_a_surrogate_pair_is_one_sentence(tokenizer: Any) -> None:
    for reader in (tokenizer, Slow(tokenizer)):
        with pytest.raises(DataError, match="half of a surrogate pair"):
            encode(reader, "Q: \ud83d", " Moo")
        with pytest.raises(DataError, match="half of a surrogate pair"):
            encode_prompt(reader, "Q: \ud83d")
