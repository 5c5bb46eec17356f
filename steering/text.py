"""From text to token ids: one way for all packages.

A tokenizer of transformers is taken, and nothing of transformers imported.

The special tokens that a tokenizer puts before a text (a beginning-of-text token, mostly) are put there once: a text
that begins with the first of them, because a chat template has written it, gets none again. What a tokenizer puts after
a text (an end-of-text token, with a few) is left out, because every text here is gone on with, or scored to its last
own token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steering.errors import TextError

PROBE = "a"  # any text: what a tokenizer puts before it shows what it puts before every text


@dataclass(frozen=True)
class TokenizedText:
    """`ids`: the special tokens that were put before the text, `added` of them, then the text's own."""

    ids: tuple[int, ...]
    added: int
    spans: tuple[tuple[int, int], ...] | None  # the characters that each token stands for; None: a slow tokenizer


def special_tokens_before(tokenizer: Any) -> tuple[int, ...]:
    """The ids that a tokenizer puts before every text; empty where it puts none."""
    own = _ids(tokenizer, PROBE, special=False)
    whole = _ids(tokenizer, PROBE, special=True)
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return tuple(whole[:start])
    return ()


def tokenize(tokenizer: Any, text: str, *, add_special_tokens: bool | None = None) -> TokenizedText:
    """The ids of a text.

    `add_special_tokens`: True: the tokenizer's own come before it, whatever it begins with; False: none do; None: they
    do, unless the text begins with the first of them.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    options = {"return_offsets_mapping": True} if fast else {}
    encoding = tokenizer(text, add_special_tokens=False, verbose=False, **options)
    own = list(encoding["input_ids"])
    before = () if add_special_tokens is False else special_tokens_before(tokenizer)
    if add_special_tokens is None and before and own[:1] == [before[0]]:
        before = ()
    spans = (*((0, 0) for _ in before), *map(tuple, encoding["offset_mapping"])) if fast else None
    return TokenizedText((*before, *own), len(before), spans)


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The ids that `tokenize` gives. Raises TextError for a lone surrogate."""
    check_characters(text)
    return list(tokenize(tokenizer, text, add_special_tokens=None if add_special_tokens else False).ids)


def tokenize_pair(
    tokenizer: Any, prompt: str, continuation: str, *, add_special_tokens: bool | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of a prompt and of what follows it, from one tokenization of the whole text, as a model sees it.

    A token that holds characters of both belongs to the continuation: it is predicted from the token before it. Either
    may be empty: the continuation where it adds no token, the prompt where its only token goes on into the
    continuation.
    """
    whole = tokenize(tokenizer, prompt + continuation, add_special_tokens=add_special_tokens)
    if whole.spans is not None:
        places = range(whole.added, len(whole.ids))
        first = next((place for place in places if whole.spans[place][1] > len(prompt)), len(whole.ids))
    else:
        alone = tokenize(tokenizer, prompt, add_special_tokens=add_special_tokens).ids
        first = _common(whole.ids, alone)
    return whole.ids[:first], whole.ids[first:]


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


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
