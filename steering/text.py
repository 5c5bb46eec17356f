"""From text to token ids, one way for whoever reads text: extraction, evaluation, scoring, serving."""

from collections.abc import Mapping, Sequence
from typing import Any

from steering.errors import TextError


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The text's ids, with the special tokens of the tokenizer's own rule unless `add_special_tokens` is false.

    A text that begins with the beginning-of-text token's own string, as those do that a chat template has rendered,
    does not get that token a second time. Raises TextError for a lone surrogate.
    """
    check_characters(text)
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    return ids[doubled(tokenizer, text, ids) :] if add_special_tokens else ids


def doubled(tokenizer: Any, text: str, ids: Sequence[int]) -> int:
    """How many tokens at the front of `ids`, the text's with special tokens, repeat what the text begins with: 0 or 1.

    Found by the ids themselves: some tokenizers put a token in front that they do not call `bos_token`.
    """
    if len(ids) < 2 or ids[0] != ids[1]:
        return 0
    written = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return int(len(written) < len(ids) and list(ids[1 : len(written) + 1]) == written)


def check_characters(text: str) -> None:
    """Raises TextError for half of a surrogate pair, which no tokenizer takes: JSON can write it, as in "\\ud83d"."""
    if lone := lone_surrogate(text):
        raise TextError(f"the text holds {lone}, half of a surrogate pair, which is no character")


def lone_surrogate(text: str) -> str | None:
    """The first one as it is written in JSON; None where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def render_chat(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> str:
    """A conversation of `{"role", "content"}` in the tokenizer's chat template, up to where the next answer begins.

    Its special tokens are written out: its ids are those of `encode(..., add_special_tokens=False)`. Templates that
    take a turn's content as a list of parts get it so. Raises TextError where there is no template, where it refuses
    the turns, or leaves out what a user says in them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TextError("the model's tokenizer has no chat template")
    for turn in turns:
        check_characters(turn["content"])
    said = [turn["content"].strip() for turn in turns if turn["role"] == "user"]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    problem = "it leaves out what the user says"
    for form in ([dict(turn) for turn in turns], parts):
        try:
            text: str = tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs: they refuse by raising whatever they like
            problem = str(error)
            continue
        if all(one in text for one in said):
            return text
    raise TextError(f"the model's chat template cannot render these turns: {problem}")
